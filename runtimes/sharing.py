"""Rows that begin alike: what they share is computed once, and each row continues from it.

A reranker's rows begin with the system prompt and the instruction, and those of one query with the
query too. Token ids are not touched: what is shared is what the finished rows have in common.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import numpy as np

from ..attention import SHORT_ROW
from ..progress import progress_bar
from .batching import make_batches, pad

# Keys and values of all layers are held while a group runs: 0.2 to 0.3 MB a token.
SHARED_TOKENS = 1024


class ContinuingModel(Protocol):
    """A model whose rows may continue a past."""

    def read(self, ids: np.ndarray, *, short: bool) -> np.ndarray:
        """Keys and values of tokens that rows begin with, int64 [tokens].

        Args:
            ids: The tokens.
            short: Whether the rows are (`SHORT_ROW`).
        """
        ...

    def __call__(
        self, input_ids: np.ndarray, attention_mask: np.ndarray, past: np.ndarray | None = None
    ) -> np.ndarray:
        """Run a batch of rows, int64 [batch, sequence], behind `past`, to float32 [batch]."""
        ...


def group_rows(keys: Sequence[Hashable], lengths: Sequence[int]) -> list[list[int]]:
    """Row numbers by key, the keys in their first order; short rows (`SHORT_ROW`), then long ones.

    Rows that have their keys for themselves are one group of either kind, its last: they share
    less, but something.

    Args:
        keys: What rows of one group have in common.
        lengths: Tokens of each row.
    """
    found = []
    for short in (True, False):
        groups: dict[Hashable, list[int]] = {}
        for row, (key, length) in enumerate(zip(keys, lengths, strict=True)):
            if (length <= SHORT_ROW) == short:
                groups.setdefault(key, []).append(row)
        alone = [group[0] for group in groups.values() if len(group) == 1]
        found += [group for group in groups.values() if len(group) > 1]
        found += [alone] if alone else []
    return found


def shared_length(rows: Sequence[np.ndarray]) -> int:
    """Tokens that all rows begin with, SHARED_TOKENS at most; each row keeps one of its own.

    Args:
        rows: Token ids, int64 [tokens] each; a single row shares nothing.
    """
    if len(rows) == 1:
        return 0
    length = min(SHARED_TOKENS, *(len(row) - 1 for row in rows))
    for row in rows[1:]:
        differing = np.flatnonzero(row[:length] != rows[0][:length])
        length = int(differing[0]) if len(differing) else length
    return length


def run_groups(
    model: ContinuingModel,
    rows: Sequence[np.ndarray],
    groups: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    description: str,
    progress: bool,
) -> np.ndarray:
    """Run rows group by group; what a group's rows begin with runs once.

    Args:
        model: The model.
        rows: Token ids, int64 [tokens] each.
        groups: Row numbers, each once; of one group all short or all long (`SHORT_ROW`).
        batch_tokens: The budget of a batch, what is shared counted for each row: attention holds
            its keys and values for each.
        description: What the progress bar says.
        progress: Whether to show it.

    Returns:
        float32 [rows] in the order of `rows`.
    """
    results = np.empty(len(rows), np.float32)
    with progress_bar(description, len(rows), enabled=progress) as advance:
        for group in groups:
            members = [rows[i] for i in group]
            length = shared_length(members)
            short = len(members[0]) <= SHORT_ROW
            past = model.read(members[0][:length], short=short) if length else None
            for batch in make_batches([len(row) for row in members], batch_tokens):
                ids, mask = pad([members[i][length:] for i in batch])
                results[[group[i] for i in batch]] = model(ids, mask, past)
                advance(len(batch))
    return results
