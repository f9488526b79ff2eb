"""Texts that tell tokenizers apart. Only their token ids are compared, so no model runs on them.

The texts that are validated seldom hold special tokens, odd spaces or as many tokens as the model
takes; a tokenizer that is wrong there would pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.pipeline import ROLES
from ..checkpoint.spec import Task
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import CheckpointError, InputError
from ..texts.samples import Pair, Sample
from .gates import token_gate
from .report import Gate
from .tasks import EmbeddingTask, RerankerTask

PLAIN = (
    " leading and trailing \n",
    "tabs\tand\r\nlines\n\n\nand   spaces",
    "\ufeffno\u00a0break, \u2003em, zero\u200bwidth",
    "\u00e9 e\u0301 \ufb01 \u2460 \u00bd \u212b \u0130STANBUL \u1e9e",
    "NUL \x00 and bell \x07",
    "I'LL don't 12345.678 x_1 camelCase",
    "日本語 한국어 العربية हिन्दी 👩\u200d👩\u200d👧",
)
# Added tokens in one text, and of the first and last of them, those that end a text: a classifier
# skips its padding token there.
TOKENS, ENDS = 50, 8


@dataclass(frozen=True)
class Probes:
    """A recorded reference's tokenizer: its token ids for the probing texts, and its added tokens.

    Attributes:
        inputs: Texts or pairs that tell tokenizers apart.
        rows: Their token ids.
        added: The added tokens of the checkpoint's tokenizer.
    """

    inputs: Sequence[Sample | Pair]
    rows: Sequence[Sequence[int]]
    added: Sequence[str]


def probe_tokens(runtime: Any, source: Any, folders: Iterable[Path]) -> Gate:
    """The gate on token ids, for texts that tell tokenizers apart.

    Args:
        runtime: The artifact's Embedder or Reranker.
        source: The reference, a `LiveReference`.
        folders: Folders with a tokenizer.json each, the artifact's and the checkpoint's; their
            added tokens are in the texts.
    """
    short, long = _inputs(runtime.info.task, _added_tokens(folders), runtime.tokenizer.max_length)
    gate = _compare(runtime, source, short)
    if not gate.failed:  # apart from the others, which would be padded to its length
        gate = _compare(runtime, source, [long])
    return _beside(gate)


def record_probes(source: Any) -> Probes:
    """The token ids of a checkpoint's library for texts that tell tokenizers apart.

    Args:
        source: The reference, a `LiveReference`.
    """
    added = _added_tokens([source.folder])
    short, long = _inputs(source.spec.task, added, source.limit)
    inputs, rows = [], []
    for given in (*short, long):
        try:
            rows += source.token_ids([given])
        except (CheckpointError, InputError):  # a text that it cannot take
            continue
        inputs.append(given)
    return Probes(inputs, rows, added)


def compare_probes(runtime: Any, probes: Probes, max_length: int) -> Gate:
    """The gate on token ids, for the texts of a recorded reference.

    Args:
        runtime: The artifact's Embedder or Reranker.
        probes: The recorded token ids.
        max_length: Tokens after which the recorded texts were cut. For an artifact that cuts texts
            at another length, those that either cuts are left out.
    """
    own = runtime.tokenizer.max_length
    uncut = len(max(probes.rows, key=len)) + 1 if own == max_length else min(own, max_length)
    kept = [i for i, row in enumerate(probes.rows) if len(row) < uncut]
    inputs, rows = [probes.inputs[i] for i in kept], [probes.rows[i] for i in kept]
    gate = _compare(runtime, None, inputs, rows)
    others = [name for name in _added_tokens([runtime.info.folder]) if name not in probes.added]
    if not gate.failed and others:
        detail = f"the added token {others[0]!r} is not one of the reference's tokenizer"
        gate = replace(gate, value=len(others), detail=detail)
    return _beside(gate)


def _beside(gate: Gate) -> Gate:
    return replace(gate, detail=f"beside the inputs: {gate.detail}") if gate.failed else gate


def _added_tokens(folders: Iterable[Path]) -> list[str]:
    """The added tokens of tokenizers."""
    tokens = {
        token.content: None
        for folder in folders
        for token in load_tokenizer(folder / "tokenizer.json").get_added_tokens_decoder().values()
    }
    return list(tokens)


def _inputs(
    task: Task, added: Sequence[str], max_length: int
) -> tuple[Sequence[Sample | Pair], Sample | Pair]:
    """(inputs with odd texts and added tokens between words, one that is longer than the limit)."""
    texts = [
        *PLAIN,
        *(
            # Behind a token that is looked for in normalized text, NFC makes one letter of ">" and
            # the last character here.
            "".join(f"a{name}b {name} {name}\u0338 " for name in added[start : start + TOKENS])
            for start in range(0, len(added), TOKENS)
        ),
        *(f"end{name}" for name in dict.fromkeys([*added[:ENDS], *added[-ENDS:]])),
    ]
    # Each word is a token at least.
    long = f"first {'word ' * max_length}last"
    if task == "reranker":
        *pairs, last = (Pair(f"find {text[:40]}", text) for text in (*texts, long))
        return pairs, last
    return [Sample(text, role) for role in ROLES for text in texts], Sample(long, "document")


def _compare(
    runtime: Any,
    source: Any,
    inputs: Sequence[Any],
    expected: Sequence[Sequence[int]] | None = None,
) -> Gate:
    """Compare token ids of the inputs that the artifact does not refuse."""
    kind: Any = EmbeddingTask if runtime.info.task == "embedding" else RerankerTask
    taken, rows = [], []
    for i, given in enumerate(inputs):
        try:
            rows += kind([given]).artifact_ids(runtime)
        except InputError:
            continue
        taken.append(i)
    chosen = [inputs[i] for i in taken]
    wanted = source.token_ids(chosen) if expected is None else [expected[i] for i in taken]
    return token_gate(kind(chosen), rows, wanted)
