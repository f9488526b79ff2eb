"""Whether a text's result depends on its neighbours or its padding. It must not.

What users of other exports met: texts that embed differently alone and in a batch, under left and
right padding, or only when all of a batch are equally long
(https://github.com/huggingface/text-embeddings-inference/issues/642, /704, /883).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from .measures import cosines

Model = Callable[[np.ndarray, np.ndarray], np.ndarray]

ROWS = 32
# Rows are cut to lengths from the one to the other, their ends kept: a reranker's rows all begin
# alike, and may all be equally long.
SHORTEST, LONGEST = 4, 48
EXTRA = 9
BATCH_SIZES = (2, 7, 32)


def check_invariance(model: Model, rows: Sequence[np.ndarray]) -> dict[str, float]:
    """Run texts alone, then in every arrangement, and compare.

    Args:
        model: (input_ids, attention_mask), int64 [batch, size], to [batch, dim] or [batch].
        rows: Token ids, int64 [tokens] each; 32 of them at most are used, 48 tokens of each.

    Returns:
        Arrangement to agreement with each row alone: the least cosine of vectors, or the largest
        difference of scores. NaN if a result is not finite.
    """
    rows = _spread(rows)
    alone = _run(model, rows, size=1)
    longest = max(map(len, rows))
    equal = [np.resize(row, longest) for row in rows]
    order = np.random.default_rng(0).permutation(len(rows))
    shuffled = np.empty_like(alone)
    shuffled[order] = _run(model, [rows[i] for i in order])
    arranged = {
        "ragged batch": _run(model, rows),
        "another order": shuffled,
        "left padding": _run(model, rows, left=1.0),
        "padding on both sides": _run(model, rows, left=0.5, extra=EXTRA),
        "extra padding on the right": _run(model, rows, extra=EXTRA),
        "extra padding on the left": _run(model, rows, left=1.0, extra=EXTRA),
    }
    for size in BATCH_SIZES:
        arranged[f"batches of {size}"] = _run(model, rows, size=size)
    agreement = {name: _agreement(found, alone) for name, found in arranged.items()}
    agreement["equally long batch"] = _agreement(_run(model, equal), _run(model, equal, size=1))
    return agreement


def _spread(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """At most `ROWS` rows, from the shortest to the longest, of different lengths."""
    ordered = sorted(rows, key=len)
    count = min(ROWS, len(ordered))
    picked = np.linspace(0, len(ordered) - 1, count).round().astype(int)
    limits = np.linspace(SHORTEST, LONGEST, count).round().astype(int)
    return [ordered[i][-limit:] for i, limit in zip(picked, limits, strict=True)]


def _run(
    model: Model,
    rows: Sequence[np.ndarray],
    *,
    size: int | None = None,
    left: float = 0.0,
    extra: int = 0,
) -> np.ndarray:
    """Run rows in batches of `size`, a share `left` of the padding on the left."""
    size = size or len(rows)
    results = []
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        width = max(map(len, batch)) + extra
        input_ids = np.zeros((len(batch), width), np.int64)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(batch):
            begin = int(left * (width - len(row)))
            input_ids[i, begin : begin + len(row)] = row
            attention_mask[i, begin : begin + len(row)] = 1
        results.append(model(input_ids, attention_mask))
    return np.concatenate(results)


def _agreement(a: np.ndarray, b: np.ndarray) -> float:
    if a.ndim == 1:
        return float(np.abs(a - b).max())
    return float(cosines(a, b).min())
