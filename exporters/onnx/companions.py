"""The files beside the graph that make the folder complete, in the sentence-transformers layout."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...chat import FURTHER
from ...errors import InputError
from ...layout import copy_modules, write_sentence_transformers
from ...spec import ModelSpec

COPIED = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def write_companions(spec: ModelSpec, folder: Path) -> None:
    """Write tokenizer, configuration and sentence-transformers' files, as the checkpoint has them.

    An embedder without modules.json gets those that say what is computed.

    The hub's cache holds symbolic links; what is written here are plain files.

    Raises:
        InputError: A file of the checkpoint cannot be read.
    """
    source = spec.source.folder
    try:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        for template in sorted((source / FURTHER).glob("*.jinja")):
            (folder / FURTHER).mkdir(exist_ok=True)
            shutil.copyfile(template, folder / FURTHER / template.name)
        shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
        copied = copy_modules(source, folder)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be copied: {error.strerror}") from error
    if spec.task == "embedding" and not copied:
        inputs = spec.inputs
        write_sentence_transformers(folder, spec.hidden_size, inputs.prompts, inputs.default_prompt)
