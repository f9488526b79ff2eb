"""Reads a checkpoint's task from its model card: the YAML header of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

CARD = "README.md"
LONGEST = 1 << 20
# The hub's names of the two tasks, and the tags that people use for them.
RERANKER = {"text-ranking", "reranker", "reranking", "cross-encoder"}
EMBEDDING = {"feature-extraction", "sentence-similarity", "text-embeddings-inference", "embedding"}
HEADER = re.compile(r"\A---\s*\n(.*?)\n---\s*(?:\n|\Z)", re.DOTALL)
TAGS = re.compile(r"^tags:\s*\n((?:\s*-\s*.+\n?)+)", re.MULTILINE)
BASES = re.compile(r"qwen3-(reranker|embedding)", re.IGNORECASE)


def declared_task(folder: Path) -> Literal["embedding", "reranker"] | None:
    """The task that a model card names by pipeline_tag, tags or base_model; None if none does.

    Args:
        folder: The checkpoint's folder.
    """
    header = _read_header(folder / CARD)
    tag = re.search(r"^pipeline_tag:\s*['\"]?([\w-]+)", header, re.MULTILINE)
    tags = TAGS.search(header)
    words = [tag.group(1)] if tag else []
    listed = re.findall(r"-\s*['\"]?([\w-]+)", tags.group(1)) if tags else []
    for names in (words, listed):
        if RERANKER & set(names):
            return "reranker"
        if EMBEDDING & set(names):
            return "embedding"
    base = BASES.search("\n".join(re.findall(r"^base_model:.*(?:\n\s*-.*)*", header, re.MULTILINE)))
    if base is None:
        return None
    return "reranker" if base.group(1).lower() == "reranker" else "embedding"


def _read_header(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        header = HEADER.match(file.read(LONGEST))
    return header.group(1) if header else ""
