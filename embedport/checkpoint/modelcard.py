"""Reads a checkpoint's task from its model card: the YAML header of README.md."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import CheckpointError
from .pipeline import Task

CARD = "README.md"
LONGEST = 1 << 20
# The hub's names of the two tasks, and the tags that people use for them.
RERANKER = {"text-ranking", "reranker", "reranking", "cross-encoder"}
EMBEDDING = {"feature-extraction", "sentence-similarity", "text-embeddings-inference", "embedding"}
HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
COMMENT = re.compile(r"(^|\s)#.*")
BASE = re.compile(r"qwen3-(reranker|embedding)", re.IGNORECASE)


def declared_task(folder: Path) -> Task | None:
    """The task that a model card names by pipeline_tag, tags or base_model; None if none does.

    Args:
        folder: The checkpoint's folder.

    Raises:
        CheckpointError: The card cannot be read.
    """
    header = _read_header(folder / CARD)
    for key in ("pipeline_tag", "tags"):
        names = {name.strip(" \t-'\"") for name in re.split(r"[\n,\[\]]", _entry(header, key))}
        if RERANKER & names:
            return "reranker"
        if EMBEDDING & names:
            return "embedding"
    base = BASE.search(_entry(header, "base_model"))
    if base is None:
        return None
    return "reranker" if base[1].lower() == "reranker" else "embedding"


def _entry(header: str, key: str) -> str:
    """The text of a key's value: the rest of its line, and the lines of a list below it."""
    entry = re.search(rf"^{key}:(.*(?:\n\s*-.*)*)", header, re.MULTILINE)
    return entry[1] if entry else ""


def _read_header(path: Path) -> str:
    try:
        if not path.is_file():
            return ""
        with path.open(encoding="utf-8", errors="replace") as file:
            header = HEADER.match(file.read(LONGEST))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    return COMMENT.sub("", header[1]) if header else ""
