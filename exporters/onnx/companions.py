"""The files beside the graph that make the folder complete, in the sentence-transformers layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ...errors import InputError
from ...prompts import append_end_of_text, load_tokenizer
from ...spec import ModelSpec

COPIED = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
    "sentence_bert_config.json",
)
MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def write_companions(spec: ModelSpec, folder: Path) -> None:
    """Write tokenizer, configuration and, for an embedding, sentence-transformers' files.

    The hub's cache holds symbolic links; what is written here are plain files.

    Raises:
        InputError: A file of the checkpoint cannot be read.
    """
    source = spec.source.folder
    try:
        for name in COPIED:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be copied: {error.strerror}") from error
    _write_tokenizer(spec, folder / "tokenizer.json")
    if spec.task == "embedding":
        _write_sentence_transformers(spec, folder)


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
    shutil.copyfile(original, path)


def _write_sentence_transformers(spec: ModelSpec, folder: Path) -> None:
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": spec.hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    )
    _write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": dict(spec.prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def _write_json(path: Path, values: object) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
