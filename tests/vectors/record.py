"""Write reference.npz: what the demo pair gives on this machine in fp32, int8 and int4.

    python -m tests.vectors.record     (or: make vectors)

Run it after a change that is meant to alter vectors, on a machine with the kernels, and say in the
commit why they changed. It prints how far the new vectors are from the recorded ones.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

import embedport
from embedport.artifact.witness import choose_rows
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.runtimes import Embedder, Reranker
from embedport.texts.samples import builtin_samples

from .compare import LIMITS, REFERENCE, apart

CHECKPOINTS = {"embedding": builtin_embedder, "reranker": builtin_reranker}
QUERY = "how did a navigator find the latitude"
# A built-in text beyond SHORT_ROW with the demo's tokenizer, beside the rows of a witness.
LONG = 26


def export_demo(task: str, precision: str, folder: Path) -> Embedder | Reranker:
    """Export one of the pair, and load it on the CPU."""
    options: dict[str, Any] = {"fast": True, "rotate": False} if precision == "int4" else {}
    artifact = embedport.export(
        CHECKPOINTS[task](), folder / f"{task}-{precision}", precision=precision, **options
    )
    return embedport.load(artifact.folder, device="cpu")


def run_rows(loaded: Embedder | Reranker, rows: list[np.ndarray]) -> np.ndarray:
    """The results of rows: float32 [rows, dim] or [rows]."""
    if isinstance(loaded, Reranker):
        return loaded.score_rows(rows, [0] * len(rows))
    return loaded.embed_rows(rows)


def _rows(loaded: Embedder | Reranker) -> list[np.ndarray]:
    info = loaded.info
    rows, _ = choose_rows(info.folder, info.task, info.inputs, info.max_length, info.vocab_size)
    text = builtin_samples()[LONG].text
    if isinstance(loaded, Reranker):
        return rows + loaded.tokenizer.encode([(QUERY, text)]).ids
    return rows + loaded.tokenizer.encode([text]).ids


def main() -> None:
    """Record."""
    arrays: dict[str, np.ndarray] = {}
    with TemporaryDirectory() as folder:
        for task in CHECKPOINTS:
            for precision in LIMITS:
                loaded = export_demo(task, precision, Path(folder))
                rows = _rows(loaded)
                found = arrays[f"{task}/{precision}"] = run_rows(loaded, rows)
                if REFERENCE.is_file():
                    part = apart(task, precision, found)
                    print(f"{task} {precision}: {part:.4f} of the limit from the earlier ones")  # noqa: T201
            arrays[f"{task}/input_ids"] = np.concatenate(rows).astype(np.int32)
            arrays[f"{task}/lengths"] = np.array([len(ids) for ids in rows], np.int32)
    np.savez_compressed(REFERENCE, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
