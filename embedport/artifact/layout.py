"""Writes sentence-transformers' files: copies of the source's, or those of a plain embedder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoint.modules import EARLY_POOLING, MODULES, SETTINGS, TRANSFORMER
from ..checkpoint.pipeline import PoolingMode
from ..checkpoint.pooling import DENSE_FILE
from ..strict_json import load_json, read_optional_json

PLAIN = {
    "": "sentence_transformers.models.Transformer",
    "1_Pooling": "sentence_transformers.models.Pooling",
    "2_Normalize": "sentence_transformers.models.Normalize",
}


def copy_modules(source: Path, folder: Path) -> bool:
    """Copy the files that sentence-transformers reads beside a checkpoint.

    Args:
        source: The checkpoint's folder; `modules` must have checked its modules.json.
        folder: The folder to write to.

    Returns:
        Whether the source has a modules.json.
    """
    if not (source / MODULES).is_file():
        return False
    for name in (MODULES, SETTINGS, TRANSFORMER):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for entry in load_json(source / MODULES):
        place = PurePosixPath(entry["path"])
        if not place.parts:
            continue
        for name in ("config.json", DENSE_FILE):
            if (source / place / name).is_file():
                (folder / place).mkdir(exist_ok=True)
                shutil.copyfile(source / place / name, folder / place / name)
    return True


def turn_into_classifier(folder: Path) -> None:
    """Turn a reranker's modules, if there are any, into those of a classifier with one label.

    Args:
        folder: The folder that `copy_modules` has written to, with the classifier's config.json.
    """
    if not (folder / MODULES).is_file():
        return
    first, *rest = load_json(folder / MODULES)
    for entry in rest:
        shutil.rmtree(folder / PurePosixPath(entry["path"]), ignore_errors=True)
    write_json(folder / MODULES, [first])
    path = folder / TRANSFORMER
    changes = {"transformer_task": "sequence-classification", "module_output_name": "scores"}
    write_json(path, read_optional_json(path) | changes)
    # CrossEncoder takes the activation from there; that of two labels became a sigmoid.
    path, config = folder / SETTINGS, load_json(folder / "config.json")
    write_json(path, read_optional_json(path) | config["sentence_transformers"])


def write_sentence_transformers(
    folder: Path,
    hidden_size: int,
    prompts: Mapping[str, str],
    default_prompt: str | None = None,
) -> None:
    """Write the files of an embedder with last-token pooling and normalized vectors.

    These are modules.json, 1_Pooling/config.json and config_sentence_transformers.json.

    Args:
        folder: The model's folder.
        hidden_size: Width of a vector.
        prompts: Prompt name to the text that is put before an input.
        default_prompt: Name of the prompt used when the caller gives none.
    """
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": kind}
        for i, (path, kind) in enumerate(PLAIN.items())
    ]
    write_json(folder / MODULES, modules)
    write_json(folder / "1_Pooling" / "config.json", pooling_values(hidden_size, "lasttoken"))
    write_json(
        folder / SETTINGS,
        {
            "prompts": dict(prompts),
            "default_prompt_name": default_prompt,
            "similarity_fn_name": "cosine",
        },
    )


def pooling_values(
    hidden_size: int, mode: PoolingMode, *, include_prompt: bool = True
) -> dict[str, Any]:
    """A pooling's settings in the keys that every version of every reader knows.

    Args:
        hidden_size: Width of a token's vector.
        mode: How the tokens' vectors become one.
        include_prompt: Whether the prompt's tokens are pooled too.

    Returns:
        The values of the pooling's config.json.
    """
    return {
        "word_embedding_dimension": hidden_size,
        **{key: value == mode for key, value in EARLY_POOLING.items()},
        "include_prompt": include_prompt,
    }


def write_json(path: Path, values: object) -> None:
    """Write a JSON file, and create its folder if needed."""
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
