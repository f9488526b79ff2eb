"""Checkpoints at real geometries with random weights and Qwen3's own tokenizer."""

from __future__ import annotations

import contextlib
import lzma
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "tests" / "data" / "qwen3-tokenizer" / "tokenizer.json.xz"
CACHE = ROOT / "build" / "benchmarks"


def checkpoint(geometry: str, task: str = "embedding") -> Path:
    """The checkpoint of a geometry, cached under build/benchmarks/.

    Geometries are "0.6b" and "8b"; "0.6b-4" is "0.6b" with four layers.

    A child process writes it: a child's ru_maxrss starts at its parent's memory, so a process that
    measures children must stay small.
    """
    folder = CACHE / f"{task}-{geometry}"
    if not (folder / "made").exists():
        subprocess.run(
            [sys.executable, "-m", "benchmarks.checkpoint", geometry, str(folder), task],
            check=True,
        )
        (folder / "made").touch()
    return folder


@contextlib.contextmanager
def scratch() -> Generator[Path]:
    """A temporary folder under build/benchmarks/."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        yield Path(folder)


def require_space(needed: int) -> None:
    """Check that the disk has enough free space.

    Args:
        needed: Bytes to be written under build/benchmarks/.

    Raises:
        RuntimeError: Fewer bytes are free.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(CACHE).free
    if free < needed:
        raise RuntimeError(f"{CACHE}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


def make(geometry: str, folder: str, task: str) -> None:
    """Write a checkpoint with random weights and Qwen3's own tokenizer."""
    from tokenizers import Tokenizer

    from tests import synthetic

    name, _, layers = geometry.partition("-")
    sizes = {"0.6b": synthetic.QWEN3_0_6B, "8b": synthetic.QWEN3_8B}[name]
    if layers:
        sizes = replace(sizes, num_layers=int(layers))
    tokenizer = Tokenizer.from_str(lzma.decompress(TOKENIZER.read_bytes()).decode("utf-8"))
    synthetic.write_checkpoint(
        Path(folder), sizes, "reranker" if task == "reranker" else "embedding", tokenizer
    )


if __name__ == "__main__":
    make(*sys.argv[1:])
