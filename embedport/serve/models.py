"""Models as the server runs them: texts to rows of token ids, and rows of many requests to results.

A server's batch is put together of several requests' rows. What may be together, how many rows are
worth looking at, and which of them run next depends on the kind of model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..checkpoint.pipeline import ROLES
from ..errors import InputError
from ..runtimes import Embedder, Reranker
from ..runtimes.batching import choose_batch_tokens, make_batches
from ..runtimes.embedder import check_encoded, check_pooled
from ..texts.prompts import Encoded
from .errors import RequestError

# Batches' worth of waiting tokens from which one batch of similar lengths is chosen.
EMBEDDING_WINDOW = 8
# Batches' worth of a reranker's rows that run together, behind one computed prefix.
RERANKER_WINDOW = 4
RERANKER_CHUNK = 16


@dataclass(frozen=True)
class Lane:
    """The properties that rows of one batch have in common.

    Attributes:
        model: The model.
        prompt_length: From `Embedder.prompt_length`.
    """

    model: ServedModel
    prompt_length: int = 0


@dataclass(frozen=True)
class Rows:
    """A request's texts as token ids.

    Attributes:
        lane: What they must have in common with other rows of a batch.
        ids: int64 [tokens] each.
        key: What all of them begin with: a reranker's query and instruction.
    """

    lane: Lane
    ids: list[np.ndarray]
    key: Hashable = None

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return sum(len(ids) for ids in self.ids)


class ServedModel(ABC):
    """A model with its name.

    Args:
        name: The name that requests give.
        runner: The embedder or reranker.
        batch_tokens: As for `Embedder.encode`.

    Attributes:
        chunk: Number of rows taken from one request before the next has its turn.
        window: Number of waiting tokens that are looked at for a batch.
    """

    chunk: int
    window: int

    def __init__(self, name: str, runner: Embedder | Reranker, batch_tokens: int | None) -> None:
        self.name, self.info = name, runner.info
        self.device, self.precision = runner.device, runner.precision
        self.max_length = runner.tokenizer.max_length
        self.batch_tokens = choose_batch_tokens(batch_tokens, runner.device)

    @property
    @abstractmethod
    def width(self) -> tuple[int, ...]:
        """The shape of one row's result."""

    @abstractmethod
    def pick(self, lengths: Sequence[int]) -> list[int]:
        """Choose which of the waiting rows run next; the first is always among them.

        Args:
            lengths: Tokens of each row.
        """

    @abstractmethod
    def run(self, rows: Sequence[np.ndarray], keys: Sequence[Hashable], lane: Lane) -> np.ndarray:
        """Run rows of one lane: float32 [rows, *width]."""

    @abstractmethod
    def warm_up(self) -> None:
        """Run a short row and a full batch, so that no request pays for the first run."""

    def _checked(self, encoded: Encoded, noun: str, *, truncate: bool) -> list[np.ndarray]:
        """The token ids, if all are in the table; a text is cut only if the client allows it."""
        if encoded.truncated and not truncate:
            raise RequestError(
                422,
                f"{noun} {encoded.truncated[0]} has more than the {self.max_length:,} tokens that "
                f'{self.name} takes; send a shorter one, or "truncate": true to cut it',
                param="truncate",
            )
        check_encoded(Encoded(encoded.ids, []), self.info.vocab_size, self.max_length, noun)
        return encoded.ids


class ServedEmbedder(ServedModel):
    """An embedder with its name."""

    chunk = 1

    def __init__(self, name: str, runner: Embedder, batch_tokens: int | None) -> None:
        super().__init__(name, runner, batch_tokens)
        self.embedder = runner
        self.window = EMBEDDING_WINDOW * self.batch_tokens

    @property
    def width(self) -> tuple[int, ...]:
        """The width of a vector."""
        return (self.embedder.dim,)

    def check_prompt_name(self, name: str | None) -> None:
        """Check the name of a prompt: here a literal prompt would be a name misspelt.

        Raises:
            RequestError: The model has no such prompt.
        """
        names = sorted({*self.info.inputs.prompts, *ROLES})
        if name not in names:
            raise RequestError(
                400,
                f"no prompt is named {name!r:.80}; there are {', '.join(names)}. Your own "
                "instruction for queries goes into instruction",
                param="prompt_name",
            )

    def tokenize(self, texts: Sequence[str], prompt: str | None, *, truncate: bool) -> Rows:
        """Turn texts into rows.

        Args:
            texts: The texts.
            prompt: As for `Embedder.encode`.
            truncate: Whether texts beyond the model's length are cut.

        Raises:
            InputError: A text or the prompt is invalid.
            RequestError: A text is too long.
        """
        text = self.embedder.prompt_text(prompt)
        encoded = self.embedder.tokenizer.encode(texts, text)
        ids = self._checked(encoded, "text", truncate=truncate)
        prompt_length = self.embedder.prompt_length(text)
        check_pooled(ids, self.info.outputs, prompt_length)
        return Rows(Lane(self, prompt_length), ids)

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """One batch of rows of similar length."""
        return next(batch for batch in make_batches(lengths, self.batch_tokens) if 0 in batch)

    def run(self, rows: Sequence[np.ndarray], keys: Sequence[Hashable], lane: Lane) -> np.ndarray:
        """Embed rows: float32 [rows, dim]."""
        del keys
        return self.embedder.embed_rows(
            rows, prompt_length=lane.prompt_length, batch_tokens=self.batch_tokens
        )

    def warm_up(self) -> None:
        """Embed a text, and as many as make a batch."""
        row = self.tokenize(["warm-up"], None, truncate=True).ids[0]
        for count in (1, max(1, self.batch_tokens // len(row))):
            self.embedder.embed_rows([row] * count, batch_tokens=self.batch_tokens)


class ServedReranker(ServedModel):
    """A reranker with its name."""

    chunk = RERANKER_CHUNK

    def __init__(self, name: str, runner: Reranker, batch_tokens: int | None) -> None:
        super().__init__(name, runner, batch_tokens)
        self.reranker = runner
        self.window = RERANKER_WINDOW * self.batch_tokens

    @property
    def width(self) -> tuple[int, ...]:
        """A score is one number."""
        return ()

    def tokenize(
        self, query: str, documents: Sequence[str], instruction: str | None, *, truncate: bool
    ) -> Rows:
        """Turn a query and documents into rows.

        Args:
            query: The query.
            documents: The documents.
            instruction: As for `Reranker.score`.
            truncate: Whether pairs beyond the model's length are cut.

        Raises:
            InputError: A text is invalid.
            RequestError: A pair is too long.
        """
        encoded = self.reranker.tokenizer.encode(
            [(query, document) for document in documents], instruction
        )
        ids = self._checked(encoded, "pair", truncate=truncate)
        return Rows(Lane(self), ids, (query, instruction))

    def pick(self, lengths: Sequence[int]) -> list[int]:
        """All of them: pairs of one query share its prefix."""
        return list(range(len(lengths)))

    def run(self, rows: Sequence[np.ndarray], keys: Sequence[Hashable], lane: Lane) -> np.ndarray:
        """Score rows: float32 [rows]."""
        del lane
        return self.reranker.score_rows(rows, keys, batch_tokens=self.batch_tokens)

    def warm_up(self) -> None:
        """Score a few pairs."""
        rows = self.tokenize("warm-up", ["one", "two", "three"], None, truncate=True)
        self.run(rows.ids, [rows.key] * len(rows.ids), rows.lane)


def served(name: str, runner: Embedder | Reranker, batch_tokens: int | None) -> ServedModel:
    """A model as the server runs it."""
    if isinstance(runner, Embedder):
        return ServedEmbedder(name, runner, batch_tokens)
    return ServedReranker(name, runner, batch_tokens)


def name_model(artifact: str) -> str:
    """The name by which requests ask for a model: its hub id, or its folder's name.

    Raises:
        InputError: The folder has no name.
    """
    if not Path(artifact).is_dir():
        return artifact
    if not (name := Path(artifact).resolve().name):
        raise InputError(f"{artifact} has no name to serve it by; serve a folder inside it")
    return name
