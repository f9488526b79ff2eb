"""The files that make a folder a sentence-transformers model: last-token pooling, unit length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

MODULES = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def write_sentence_transformers(folder: Path, hidden_size: int, prompts: Mapping[str, str]) -> None:
    """Write modules.json, 1_Pooling/config.json and config_sentence_transformers.json.

    Args:
        folder: The model's folder.
        hidden_size: Width of a vector.
        prompts: Prompt name to the text put before an input.
    """
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(MODULES.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(
        folder / "1_Pooling" / "config.json",
        {
            "word_embedding_dimension": hidden_size,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": False,
            "pooling_mode_max_tokens": False,
            "pooling_mode_mean_sqrt_len_tokens": False,
            "pooling_mode_weightedmean_tokens": False,
            "pooling_mode_lasttoken": True,
            "include_prompt": True,
        },
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": dict(prompts),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )


def write_json(path: Path, values: object) -> None:
    """Write a JSON file, its folder too."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
