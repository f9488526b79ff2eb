"""Checkpoints at real geometries with random weights and Qwen3's own tokenizer."""

from __future__ import annotations

import lzma
from pathlib import Path

from tokenizers import Tokenizer

from embedport.demo.synthetic import QWEN3_0_6B, QWEN3_8B, write_checkpoint

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "data" / "qwen3-tokenizer" / "tokenizer.json.xz"
CACHE = ROOT / "build" / "benchmarks"
GEOMETRIES = {"0.6b": QWEN3_0_6B, "8b": QWEN3_8B}


def checkpoint(geometry: str) -> Path:
    """The embedding checkpoint of a geometry, made on first use under build/benchmarks/."""
    folder = CACHE / f"embedding-{geometry}"
    if not (folder / "made").exists():
        tokenizer = Tokenizer.from_str(lzma.decompress(TOKENIZER.read_bytes()).decode("utf-8"))
        write_checkpoint(folder, GEOMETRIES[geometry], "embedding", tokenizer)
        (folder / "made").touch()
    return folder
