"""The reranker: pairs of texts in, relevance scores out."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..checks import check_integer
from ..errors import InputError
from ..texts.prompts import RerankerTokenizer, check_list
from .batching import choose_batch_tokens, run_batches
from .embedder import check_encoded, describe_nonfinite
from .info import Model, ModelInfo
from .onnxruntime import OnnxModel
from .prefix_cache import group_rows, run_groups
from .reopening import reopen, reopening


@dataclass(frozen=True)
class Ranked:
    """A ranked document: its index in the input list, its score, and its text."""

    index: int
    score: float
    document: str


class Reranker:
    """A loaded reranker.

    Attributes:
        info: The model's description.
        artifact: The artifact it was loaded from; None for a checkpoint without a manifest.
        model: Maps (input_ids, attention_mask), int64 [batch, sequence], to float32 [batch].
        tokenizer: Maps pairs to token ids, with the reranker's template.
        device: The device it runs on.
        precision: The storage format and the arithmetic, in words.
    """

    def __init__(self, info: ModelInfo, model: Model, tokenizer: RerankerTokenizer) -> None:
        self.info = info
        self.artifact = info.artifact
        self.model: Callable[..., np.ndarray] = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.precision = model.precision

    def __repr__(self) -> str:
        return f"Reranker({self.info.name!r}, device={self.device!r}, precision={self.precision!r})"

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the recipe that opens the model again from its folder."""
        return reopen, (reopening(self.info, self.device, self.tokenizer.max_length),)

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Score pairs.

        If the model supports it, the common prefix of pairs is computed once: everything before the
        document for pairs of one query.

        Args:
            pairs: (query, document) each; an empty list is allowed.
            instruction: The task description that defines relevance; by default the model's
                default prompt. For a model with prompts it can also be a prompt's name.
            batch_tokens: Maximum tokens in a batch, including padding; by default enough to keep
                the device busy.
            progress: Whether to show a progress bar on a terminal.

        Returns:
            float32 [len(pairs)] in the order of `pairs`: the probability of "yes", or the raw score
            if the model's files name no Sigmoid.

        Raises:
            InputError: A pair is not two strings of valid Unicode, or gives NaN or infinity
                (`score_pairs` returns them).

        >>> model = embedport.load_reranker(reranker, device="cpu")
        >>> scores = model.score([("a hot drink", "tea: a hot drink"), ("a hot drink", "car")])
        >>> scores.dtype, bool(scores[0] > scores[1])
        (dtype('float32'), True)
        """
        scores = self.score_pairs(
            pairs, instruction=instruction, batch_tokens=batch_tokens, progress=progress
        )
        if problem := describe_nonfinite(scores, self.precision, "pair"):
            raise InputError(problem)
        return scores

    def score_pairs(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Score pairs as `score` does, but return NaN and infinity where the model gives them.

        Args:
            pairs: As for `score`.
            instruction: As for `score`.
            batch_tokens: As for `score`.
            progress: As for `score`.

        Returns:
            float32 [len(pairs)].

        Raises:
            InputError: A pair is not two strings of valid Unicode.
        """
        check_list(pairs, "pairs should be a list of (query, document)")
        pairs = list(pairs)  # a generator has its items once
        encoded = self.tokenizer.encode(pairs, instruction)
        check_encoded(encoded, self.info.vocab_size, self.tokenizer.max_length, "pair")
        queries = [query for query, _ in pairs]
        return self.score_rows(encoded.ids, queries, batch_tokens=batch_tokens, progress=progress)

    def score_rows(
        self,
        rows: Sequence[np.ndarray],
        queries: Sequence[Hashable],
        *,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Score pairs that are already tokenized with the reranker's template.

        Args:
            rows: Token ids, int64 [tokens] each.
            queries: A key for each row's query: rows with the same key share a prefix.
            batch_tokens: As for `score`.
            progress: As for `score`.

        Returns:
            float32 [rows], as for `score`; NaN and infinity are not looked for.
        """
        options = {
            "batch_tokens": choose_batch_tokens(batch_tokens, self.device),
            "description": "Scoring",
            "progress": progress,
        }
        if isinstance(self.model, OnnxModel) and self.model.continues:
            groups = group_rows(queries, [len(ids) for ids in rows])
            return run_groups(self.model, rows, groups, **options)
        return run_batches(self.model, rows, (), **options)

    def rank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        top_k: int | None = None,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> list[Ranked]:
        """Order documents by relevance to a query.

        Args:
            query: The query.
            documents: The documents.
            top_k: How many to return; all by default.
            instruction: As for `score`.
            batch_tokens: As for `score`.
            progress: As for `score`.

        Returns:
            The ranked documents, best first; equal scores keep the order of `documents`.

        Raises:
            InputError: A text is not valid Unicode or gives NaN, or `top_k` is below 1.

        >>> model = embedport.load_reranker(reranker, device="cpu")
        >>> [best] = model.rank("a hot drink", ["car", "tea: a hot drink"], top_k=1)
        >>> best.index, best.document
        (1, 'tea: a hot drink')
        """
        if top_k is not None:
            check_integer("top_k", top_k)
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k should be at least 1, found {top_k}")
        check_list(documents, "documents should be a list of strings")
        documents = list(documents)  # a generator has its items once
        scores = self.score(
            [(query, document) for document in documents],
            instruction=instruction,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [Ranked(int(i), float(scores[i]), documents[i]) for i in order]
