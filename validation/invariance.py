"""The invariance suite: a text must give the same result however it is batched and padded.

Each case runs real token ids with padding made here, and is compared with the same rows run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..attention import SHORT_ROW
from ..progress import progress_bar

Model = Callable[[np.ndarray, np.ndarray], np.ndarray]

ROWS = 32
FEW = 8
# Rows are cut to lengths spread between these, so that batches are ragged for any texts and a batch
# of 32 stays small.
SHORTEST, LONGEST = 8, 64
EXTRA = 16
# Graphs compute attention differently from 128 tokens and from SHORT_ROW tokens on. Rows longer
# than SHORT_ROW share no batch with shorter ones.
LONG = {"long rows": (150, 300), "longer rows": (SHORT_ROW + 32, SHORT_ROW + 128)}


@dataclass(frozen=True)
class Case:
    """One way of batching and padding.

    Attributes:
        name: The case's name in the report.
        rows: Token ids, int64 [tokens] each.
        batch: Rows per batch.
        side: The side with the padding.
        extra: Padding tokens beyond the batch's longest row.
    """

    name: str
    rows: Sequence[np.ndarray]
    batch: int
    side: Literal["left", "right"] = "right"
    extra: int = 0


@dataclass(frozen=True)
class Outcome:
    """A case's results and the results of its rows run alone: float32 [rows] or [rows, dim]."""

    case: str
    results: np.ndarray
    alone: np.ndarray


def run_suite(
    model: Model, rows: Sequence[np.ndarray], max_length: int, *, progress: bool = False
) -> list[Outcome]:
    """Run every case.

    Args:
        model: (input_ids, attention_mask), int64 [batch, sequence], to float32 [batch, ...].
        rows: Token ids of the texts, int64 [tokens] each; at least one.
        max_length: Longest row, in tokens, that the model takes.
        progress: Show a progress bar on a terminal.
    """
    suite = [*make_cases(select_rows(rows)), *make_long_cases(rows, max_length)]
    results_alone: dict[bytes, np.ndarray] = {}
    outcomes = []
    with progress_bar("Invariance", len(suite), enabled=progress) as advance:
        for case in suite:
            for ids in case.rows:
                if ids.tobytes() not in results_alone:
                    results_alone[ids.tobytes()] = model(ids[None], np.ones_like(ids[None]))[0]
            alone = np.stack([results_alone[ids.tobytes()] for ids in case.rows])
            outcomes.append(Outcome(case.name, _run(model, case), alone))
            advance(1)
    return outcomes


def select_rows(rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """32 rows of lengths from 8 to 64 tokens, in a mixed order; repeated if there are fewer.

    Rows are cut at the front, so that they end like the whole text.
    """
    by_length = sorted(rows, key=len)
    selected = [by_length[i] for i in np.linspace(0, len(rows) - 1, ROWS).round().astype(int)]
    lengths = np.linspace(SHORTEST, LONGEST, ROWS).round().astype(int)
    shortened = [ids[-length:] for ids, length in zip(selected, lengths, strict=True)]
    return [shortened[i] for i in np.random.default_rng(0).permutation(ROWS)]


def make_cases(rows: Sequence[np.ndarray]) -> list[Case]:
    """The cases over rows from `select_rows`."""
    few = rows[:FEW]
    median = sorted(map(len, rows))[len(rows) // 2]
    equal = [ids[-median:] for ids in rows if len(ids) >= median][:FEW]
    return [
        Case("equal-length batch", equal, FEW),
        Case("ragged batch, right padding", few, FEW, "right"),
        Case("ragged batch, left padding", few, FEW, "left"),
        Case("extra right padding", few, FEW, "right", EXTRA),
        Case("extra left padding", few, FEW, "left", EXTRA),
        Case("reversed order", few[::-1], FEW),
        *(Case(f"batches of {size}", rows, size) for size in (1, 2, 7, 32)),
    ]


def make_long_cases(rows: Sequence[np.ndarray], max_length: int) -> list[Case]:
    """Cases of two long rows, up to the model's limit; made by repeating the longest text."""
    longest = max(rows, key=len)
    cases = []
    for name, lengths in LONG.items():
        if lengths[0] < max_length:
            ids = np.tile(longest, -(-lengths[-1] // len(longest)))
            pair = [ids[-min(length, max_length) :] for length in lengths]
            cases.append(Case(name, pair, len(pair), "left"))
    return cases


def _run(model: Model, case: Case) -> np.ndarray:
    results = []
    for start in range(0, len(case.rows), case.batch):
        rows = case.rows[start : start + case.batch]
        results.append(model(*pad(rows, case.side, case.extra)))
    return np.concatenate(results)


def pad(
    rows: Sequence[np.ndarray], side: Literal["left", "right"], extra: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pad rows.

    The padding token is the row's last token, which is also what transformers pads with for an
    embedding model: a model that treats padding as text is caught.

    Returns:
        (input_ids, attention_mask), int64 [rows, longest + extra] each.
    """
    width = max(map(len, rows)) + extra
    input_ids = np.empty((len(rows), width), np.int64)
    attention_mask = np.zeros_like(input_ids)
    for i, ids in enumerate(rows):
        start = 0 if side == "right" else width - len(ids)
        input_ids[i] = ids[-1]
        input_ids[i, start : start + len(ids)] = ids
        attention_mask[i, start : start + len(ids)] = 1
    return input_ids, attention_mask
