"""The files beside the graph that make the folder complete, in the sentence-transformers layout."""

from __future__ import annotations

from pathlib import Path

from ...errors import InputError
from ...files import read_small
from ...layout import write_sentence_transformers
from ...prompts import append_end_of_text, load_tokenizer
from ...spec import ModelSpec
from ...tokenizer import LARGEST

COPIED = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "sentence_bert_config.json",
)


def write_companions(spec: ModelSpec, folder: Path) -> None:
    """Write tokenizer, configuration and, for an embedding, sentence-transformers' files.

    The hub's cache holds symbolic links; what is written here are plain files.

    Raises:
        InputError: A file of the checkpoint cannot be read.
    """
    source = spec.source.folder
    try:
        for name in COPIED:
            if (source / name).exists():
                (folder / name).write_bytes(read_small(source / name))
    except (OSError, ValueError) as error:
        raise InputError(f"{source / name} cannot be copied: {error}") from error
    _write_tokenizer(spec, folder / "tokenizer.json")
    if spec.task == "embedding":
        write_sentence_transformers(folder, spec.hidden_size, spec.prompts)


def _write_tokenizer(spec: ModelSpec, path: Path) -> None:
    original = spec.source.folder / "tokenizer.json"
    tokenizer = load_tokenizer(original)
    if spec.task == "embedding":
        before = tokenizer.to_str()
        append_end_of_text(tokenizer, original)
        if tokenizer.to_str() != before:
            # Whoever reads this tokenizer next ends texts as the model wants it, too.
            tokenizer.save(str(path))
            return
    path.write_bytes(read_small(original, LARGEST))
