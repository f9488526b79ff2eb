"""The reference: what an artifact is compared with.

The checkpoint, run by its own library: `library` has the folders that sentence-transformers opens,
`card` the others, which transformers runs by the model cards' code. Or what such a run gave
earlier, perhaps on another machine, read from a file: `recorded`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from ..beir import RetrievalSet
from ..demo.samples import Pair, Sample
from ..spec import Task
from .retrieval import SetQuality

Arithmetic = Literal["fp16", "bf16", "fp32"]
Inputs = Sequence[Sample] | Sequence[Pair]


@dataclass(frozen=True)
class Origin:
    """What is known of a reference.

    Attributes:
        id: The checkpoint: its folder or hub id.
        revision: Its commit on the hub.
        task: "embedding" or "reranker".
        library: What ran it: "sentence-transformers" or "transformers".
        versions: Package to version, of that library and of those under it.
        device: Where it ran, "cpu" or "cuda".
        hidden_size: Width of the model.
        vocab_size: Rows of its embedding table.
        stored: The dtype of its weights, "fp16", "bf16" or "fp32".
        files: Name to sha256 of the files that hold its weights.
        log_odds: Whether its library gives a reranker's scores as log-odds, not as probabilities.
        recorded: The day on which it was recorded, ISO 8601; None if it runs here.
        adapter: The adapter that is merged into it: its folder or hub id, and revision.
    """

    id: str
    revision: str | None
    task: Task
    library: str
    versions: Mapping[str, str]
    device: str
    hidden_size: int
    vocab_size: int
    stored: str
    files: Mapping[str, str]
    log_odds: bool = False
    recorded: str | None = None
    adapter: str | None = None

    @property
    def pinned(self) -> str:
        """The checkpoint in words."""
        at = f" at {self.revision}" if self.revision else ""
        return f"{self.id}{at}" + (f" with {self.adapter}" if self.adapter else "")

    @property
    def runner(self) -> str:
        """The library in words."""
        version = self.versions.get(self.library)
        words = f"{self.library} {version}" if version else self.library
        return f"{words}, recorded {self.recorded}" if self.recorded else words

    def describe(self, arithmetic: Arithmetic) -> str:
        """A run's arithmetic in words."""
        words: str = arithmetic
        if arithmetic == "fp32" and self.stored != "fp32":
            words = "fp32 on fp16-rounded weights"
        return f"{words}, {self.device}"


class Reference(Protocol):
    """A checkpoint's own results."""

    @property
    def origin(self) -> Origin:
        """What is known of it."""
        ...

    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """The token ids that the library gives its model, of each input."""
        ...

    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """What it is run in, the usual one first."""
        ...

    def run(self, inputs: Inputs, arithmetic: Arithmetic, *, progress: bool) -> np.ndarray:
        """Vectors, float32 [inputs, dim], or a reranker's probabilities, [inputs]."""
        ...

    def measure(
        self, data: RetrievalSet, dims: Sequence[int], arithmetic: Arithmetic, *, progress: bool
    ) -> SetQuality:
        """How good its ranking of a retrieval set is.

        Args:
            data: The set.
            dims: Leading values of the vectors to rank by; a reranker has none.
            arithmetic: What it is run in.
            progress: Whether to show a progress bar on a terminal.
        """
        ...

    def hidden_states(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """States after the embedding table and after each layer, in the most exact arithmetic.

        Args:
            rows: Token ids, int64 [tokens] each.

        Returns:
            Of each layer, of each row, float32 [tokens, hidden_size]; the last layer's are not
            normed.
        """
        ...

    def final_norm(self) -> np.ndarray:
        """The gains of the final norm, float32 [hidden_size]."""
        ...
