"""Prefix sharing: compute the common prefix of rows once, and continue each row from it.

All rows of a reranker begin with the system prompt and the instruction; rows of one query also
share the query. Token ids are not changed: a prefix is what the finished rows have in common.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from ..attention import SHORT_ROW
from ..progress import progress_bar
from .batching import group_indices, make_batches, pad
from .onnxruntime import OnnxModel

# Maximum length of a prefix. Its keys and values, 0.2 to 0.3 MB per token over all layers, stay in
# memory while a group runs.
SHARED_TOKENS = 1024


def group_rows(keys: Sequence[Hashable], lengths: Sequence[int]) -> list[list[int]]:
    """Group row numbers by key, in order of first appearance; short rows (`SHORT_ROW`) come first.

    Short and long rows are never in one group. Rows with a unique key form the last group of
    their kind: they still share a shorter prefix.

    Args:
        keys: Each row's key; rows with equal keys form a group.
        lengths: Tokens of each row.
    """
    lengths_and_keys = zip((length > SHORT_ROW for length in lengths), keys, strict=True)
    groups = group_indices(lengths_and_keys)
    ordered = []
    for is_long in (False, True):
        kind = [group for (long, _), group in groups.items() if long == is_long]
        alone = [group[0] for group in kind if len(group) == 1]
        ordered += [group for group in kind if len(group) > 1]
        ordered += [alone] if alone else []
    return ordered


def shared_length(rows: Sequence[np.ndarray]) -> int:
    """Length of the rows' common prefix: at most SHARED_TOKENS, and shorter than every row.

    Args:
        rows: Token ids, int64 [tokens] each; a single row has no common prefix.
    """
    if len(rows) == 1:
        return 0
    length = min(SHARED_TOKENS, *(len(row) - 1 for row in rows))
    for row in rows[1:]:
        differing = np.flatnonzero(row[:length] != rows[0][:length])
        length = int(differing[0]) if len(differing) else length
    return length


def run_groups(
    model: OnnxModel,
    rows: Sequence[np.ndarray],
    groups: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
    description: str,
    progress: bool,
) -> np.ndarray:
    """Run rows group by group; each group's common prefix runs once.

    Args:
        model: A model that `continues`.
        rows: Token ids, int64 [tokens] each.
        groups: Row numbers, each once; a group's rows are all short or all long (`SHORT_ROW`).
        batch_tokens: The budget of a batch. The prefix counts for every row, since attention holds
            its keys and values for each.
        description: The progress bar's label.
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
