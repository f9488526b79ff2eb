"""Texts that tell tokenizers apart. Only their token ids are compared, so no model runs on them.

The texts that are validated seldom hold special tokens, odd spaces or as many tokens as the model
takes; a tokenizer that is wrong there would pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoint.pipeline import ROLES
from ..checkpoint.tokenizer import load_tokenizer
from ..errors import InputError
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
# Added tokens in one text.
TOKENS = 50


def probe_tokens(
    runtime: Any, source: Any, task: EmbeddingTask | RerankerTask, folders: Iterable[Path]
) -> Gate:
    """The gate on token ids, for texts that tell tokenizers apart.

    Args:
        runtime: The artifact's Embedder or Reranker.
        source: The reference, a `LiveReference`.
        task: The inputs that are validated; gives the kind of input.
        folders: Folders with a tokenizer.json each, the artifact's and the checkpoint's; their
            added tokens are in the texts.
    """
    texts = [*PLAIN, *_added_tokens(folders)]
    # Each word is a token at least.
    long = f"first {'word ' * runtime.tokenizer.max_length}last"
    gate = _compare(runtime, source, _with_inputs(task, texts))
    if not gate.failed:  # apart from the others, which would be padded to its length
        gate = _compare(runtime, source, _with_inputs(task, [long], roles=("document",)))
    return replace(gate, detail=f"beside the inputs: {gate.detail}") if gate.failed else gate


def _added_tokens(folders: Iterable[Path]) -> list[str]:
    """The added tokens of tokenizers, between words, in a few texts."""
    paths = [folder / "tokenizer.json" for folder in folders]
    tokens = {
        token.content: None
        for path in paths
        for token in load_tokenizer(path).get_added_tokens_decoder().values()
    }
    names = list(tokens)
    return [
        "".join(f"a{name}b {name} " for name in names[start : start + TOKENS])
        for start in range(0, len(names), TOKENS)
    ]


def _with_inputs(
    task: EmbeddingTask | RerankerTask, texts: Sequence[str], roles: Sequence[str] = ROLES
) -> EmbeddingTask | RerankerTask:
    if isinstance(task, EmbeddingTask):
        return EmbeddingTask([Sample(text, role) for role in roles for text in texts])
    return RerankerTask([Pair(f"find {text[:40]}", text) for text in texts])


def _compare(runtime: Any, source: Any, task: Any) -> Gate:
    """Compare token ids of the inputs that the artifact does not refuse."""
    kind = type(task)
    taken, rows = [], []
    for given in task.inputs:
        try:
            rows += kind([given]).artifact_ids(runtime)
        except InputError:
            continue
        taken.append(given)
    return token_gate(kind(taken), rows, source.token_ids(taken))
