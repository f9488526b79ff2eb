"""The settings beside a graph, in words that all software understands which opens it.

A checkpoint's files have the words of the libraries that saved it. Others know earlier words only,
or look into one file only. What is written here means the same to today's libraries:

    sentence-transformers 5       modules.json: names of before 6; no options of torch's models
    transformers 4                tokenizer_config.json: classes and lists of tokens of before 5
    fastembed, transformers.js    tokenizer_config.json: the length of a text, the padding's text
    text-embeddings-inference     the length in sentence_bert_config.json; a pooling's early keys
    transformers.js               padding on the side where its pooling takes no token
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...artifact.layout import pooling_values, write_json
from ...checkpoint.modules import LOADING, MODULES, TRANSFORMER
from ...checkpoint.spec import ModelSpec
from ...checkpoint.tokens import PLAIN_CLASSES, TOKENIZER_CONFIG, special_tokens
from ...strict_json import load_json, read_optional_json

# Every version of sentence-transformers knows its modules by these names.
NAMES = "sentence_transformers.models"


def write_reader_settings(spec: ModelSpec, max_length: int, folder: Path) -> None:
    """Rewrite the copied settings that not every reader understands.

    Args:
        spec: The model.
        max_length: Tokens after which a text is truncated.
        folder: The artifact's folder, with the checkpoint's files.
    """
    _write_tokenizer(spec, max_length, folder)
    path = folder / TRANSFORMER
    kept = {key: value for key, value in read_optional_json(path).items() if key not in LOADING}
    write_json(path, kept | {"max_seq_length": max_length})
    path = folder / MODULES
    if path.is_file():
        _write_modules(spec, path)


def _write_modules(spec: ModelSpec, path: Path) -> None:
    entries, outputs = load_json(path), spec.outputs
    for entry in entries:
        name = entry["type"].rpartition(".")[2]
        entry["type"] = f"{NAMES}.{name}"
        # The early keys have no order: several poolings might be put together in another one.
        if name == "Pooling" and len(outputs.pooling) == 1:
            values = pooling_values(
                spec.hidden_size, outputs.pooling[0], include_prompt=outputs.include_prompt
            )
            write_json(path.parent / entry["path"] / "config.json", values)
    write_json(path, entries)


def _write_tokenizer(spec: ModelSpec, max_length: int, folder: Path) -> None:
    path = folder / TOKENIZER_CONFIG
    values: dict[str, Any] = read_optional_json(path) | {"model_max_length": max_length}
    if values.get("tokenizer_class") in PLAIN_CLASSES:
        values["tokenizer_class"] = PLAIN_CLASSES[0]
    if isinstance(further := values.get("extra_special_tokens"), list):
        del values["extra_special_tokens"]
        values["additional_special_tokens"] = [
            *(values.get("additional_special_tokens") or ()),
            *further,
        ]
    if padding := special_tokens(folder)[0].get("pad_token"):
        values["pad_token"] = padding
    if spec.task == "embedding":
        values["padding_side"] = "left" if spec.outputs.last_token else "right"
    write_json(path, values)
