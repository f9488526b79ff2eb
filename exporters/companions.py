"""The files beside the graph: tokenizer and configuration, in the sentence-transformers layout."""

from __future__ import annotations

from pathlib import Path

from ..artifact.layout import copy_modules, write_sentence_transformers
from ..checkpoint.chat import FURTHER
from ..checkpoint.modules import MODULES
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tokenizer import LARGEST
from ..errors import InputError
from ..files import SMALL, read_small

COPIED = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
# Files that an adapter's folder lacks.
OF_THE_BASE = ("config.json", "generation_config.json")


def write_companions(spec: ModelSpec, folder: Path) -> None:
    """Copy the checkpoint's tokenizer, configuration and sentence-transformers files.

    For an embedder without modules.json, files that describe its pooling are written.

    The hub's cache holds symbolic links; the copies are plain files.

    Raises:
        InputError: A file of the checkpoint cannot be read.
    """
    source = spec.source.pipeline
    origins = [(spec.source.folder if name in OF_THE_BASE else source) / name for name in COPIED]
    for origin in origins:
        if origin.exists():
            _copy(origin, folder / origin.name)
    for origin in sorted((source / FURTHER).glob("*.jinja")):
        _copy(origin, folder / FURTHER / origin.name)
    _copy(source / "tokenizer.json", folder / "tokenizer.json", LARGEST)
    try:
        copied = copy_modules(source, folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{source / MODULES} cannot be copied: {error}") from error
    if spec.task == "embedding" and not copied:
        inputs = spec.inputs
        write_sentence_transformers(folder, spec.hidden_size, inputs.prompts, inputs.default_prompt)


def _copy(origin: Path, copy: Path, limit: int = SMALL) -> None:
    try:
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(read_small(origin, limit))
    except (OSError, ValueError) as error:
        raise InputError(f"{origin} cannot be copied: {error}") from error
