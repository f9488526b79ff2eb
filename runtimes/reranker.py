"""Pairs of texts in, scores of relevance out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..prompts import RerankerTokenizer, check_list
from .batching import choose_batch_tokens, run_batches
from .embedder import check_encoded, describe_nonfinite
from .facts import Model, ModelFacts
from .onnxruntime import OnnxModel
from .sharing import group_rows, run_groups
from .torch import TorchModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranked:
    """A document's place in a ranking: its index in the list given, its score, and its text."""

    index: int
    score: float
    document: str


class Reranker:
    """A reranker, loaded.

    Attributes:
        facts: What it is.
        artifact: Where it came from; None for a checkpoint without a manifest.
        model: (input_ids, attention_mask), int64 [batch, sequence], to float32 [batch].
        tokenizer: Pairs to ids, under the reranker's template.
        device: What it runs on.
        precision: What is stored and what is computed in, in words.
    """

    def __init__(self, facts: ModelFacts, model: Model, tokenizer: RerankerTokenizer) -> None:
        self.facts = facts
        self.artifact = facts.artifact
        self.model: Callable[..., np.ndarray] = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.precision = model.precision

    def __repr__(self) -> str:
        return (
            f"Reranker({self.facts.name!r}, device={self.device!r}, precision={self.precision!r})"
        )

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Judge pairs.

        Where the model can, the beginnings that pairs share, up to the document for those of one
        query, are computed once.

        Args:
            pairs: (query, document) each; an empty list is defined.
            instruction: What makes a document relevant; by default the model's own, its default
                prompt. Of a model with prompts also the name of one.
            batch_tokens: Tokens of a batch at most, padding counted; by default what keeps the
                device busy.
            progress: Whether to show a progress bar on a terminal.

        Returns:
            float32 [len(pairs)], the probability of "yes", in the order of `pairs`; what the model
            gives instead where its files name no Sigmoid.

        Raises:
            InputError: A pair is not two strings of valid Unicode.
        """
        if isinstance(self.model, TorchModel):  # before the tokenizer, whose threads are gone too
            self.model.check_process()
        encoded = self.tokenizer.encode(pairs, instruction)
        check_encoded(encoded, self.facts.vocab_size, self.tokenizer.max_length, "pair")
        queries = [query for query, _ in pairs]
        scores = self.score_rows(encoded.ids, queries, batch_tokens=batch_tokens, progress=progress)
        if wrong := describe_nonfinite(scores, self.precision, "pair"):
            logger.error(wrong)
        return scores

    def score_rows(
        self,
        rows: Sequence[np.ndarray],
        queries: Sequence[Hashable],
        *,
        batch_tokens: int | None = None,
        progress: bool = False,
    ) -> np.ndarray:
        """Judge pairs that are tokenized already, under the reranker's template.

        Args:
            rows: Token ids, int64 [tokens] each.
            queries: What tells whose row each is: rows of one query begin alike.
            batch_tokens: As for `score`, like `progress`.
            progress: Whether to show it.

        Returns:
            float32 [rows], the probability of "yes".
        """
        how = {
            "batch_tokens": choose_batch_tokens(batch_tokens, self.device),
            "description": "Scoring",
            "progress": progress,
        }
        if isinstance(self.model, OnnxModel) and self.model.continues:
            groups = group_rows(queries, [len(ids) for ids in rows])
            return run_groups(self.model, rows, groups, **how)
        return run_batches(self.model, rows, (), **how)

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
            instruction: What makes a document relevant; by default the model's own, its default
                prompt. Of a model with prompts also the name of one.
            batch_tokens: Tokens of a batch at most, padding counted; by default what keeps the
                device busy.
            progress: Whether to show a progress bar on a terminal.

        Returns:
            The best first; equal scores in the order of `documents`.

        Raises:
            InputError: A text is not valid Unicode, or `top_k` is below 1.
        """
        if top_k is not None and top_k < 1:
            raise InputError(f"top_k should be at least 1, found {top_k}")
        check_list(documents, "documents should be a list of strings")
        scores = self.score(
            [(query, document) for document in documents],
            instruction=instruction,
            batch_tokens=batch_tokens,
            progress=progress,
        )
        order = np.argsort(-scores, kind="stable")[:top_k]
        return [Ranked(int(i), float(scores[i]), documents[i]) for i in order]
