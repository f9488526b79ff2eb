"""A recorded reference: results of an earlier run. It needs no torch and no weights.

`recorded_file` reads and writes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.spec import Task
from ..errors import InputError
from ..texts.beir import RetrievalSet
from ..texts.samples import Pair, Sample
from .probes import Probes
from .reference import Arithmetic, Inputs, Origin
from .retrieval import SetQuality
from .settings import Settings
from .table import TableSketch
from .tensors import Tensors


@dataclass(frozen=True)
class SetRecord:
    """Identifies the retrieval set that was measured.

    Attributes:
        name: The set's name.
        documents: sha256 of the set's documents.
        queries: Query id to sha256 of the query's text, judgments and candidates.
    """

    name: str
    documents: str
    queries: Mapping[str, str]


@dataclass(frozen=True)
class Layers:
    """Recorded hidden states of a few rows.

    Attributes:
        rows: Token ids, int64 [tokens] each.
        states: float32 [layers + 1, tokens of all rows, hidden_size].
        norm: The final norm's gains, float32 [hidden_size].
    """

    rows: list[np.ndarray]
    states: np.ndarray
    norm: np.ndarray


@dataclass(frozen=True)
class RecordedReference:
    """A reference whose results come from a file; answers as `LiveReference` does.

    Attributes:
        path: The file.
        origin: The checkpoint, and how it was run.
        max_length: Tokens after which an input was cut.
        inputs: The texts or pairs.
        rows: Their token ids.
        results: Arithmetic to vectors or probabilities, the usual arithmetic first.
        layers: Hidden states of a few rows.
        data: The retrieval set that was measured; None without one.
        qualities: Arithmetic to retrieval quality on that set.
        probes: Texts that tell tokenizers apart; None in files of early versions, as are the next.
        declared: The settings that the library read.
        sketch: The embedding table.
        plain: The tensors that are not rounded to few bits.
    """

    path: Path
    origin: Origin
    max_length: int
    inputs: Sequence[Sample | Pair]
    rows: list[list[int]]
    results: Mapping[Arithmetic, np.ndarray]
    layers: Layers
    data: SetRecord | None
    qualities: Mapping[Arithmetic, SetQuality]
    probes: Probes | None = None
    declared: Settings | None = None
    sketch: TableSketch | None = None
    plain: Tensors | None = None

    def choose_inputs(
        self, texts: Any, pairs: Any, revision: str | None
    ) -> tuple[list[Sample] | None, list[Pair] | None]:
        """The file's texts or pairs; the other one is None.

        Raises:
            InputError: The caller gave inputs of their own, or a revision.
        """
        if texts is not None or pairs is not None:
            raise InputError(
                f"{self.path} holds the texts that it was recorded on: leave yours out, or record "
                "the reference on them (embedport reference … --input …)"
            )
        if revision is not None:
            raise InputError(f"{self.path} is a file and has no revision {revision!r}")
        samples = [given for given in self.inputs if isinstance(given, Sample)]
        pairs_of_file = [given for given in self.inputs if isinstance(given, Pair)]
        return (samples, None) if samples else (None, pairs_of_file)

    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """The recorded token ids."""
        self._check_inputs(inputs)
        return self.rows

    def arithmetics(self) -> tuple[Arithmetic, ...]:
        """The recorded arithmetics, the usual one first."""
        return tuple(self.results)

    def run(self, inputs: Inputs, arithmetic: Arithmetic, *, progress: bool = False) -> np.ndarray:
        """The recorded vectors or probabilities."""
        self._check_inputs(inputs)
        return self.results[arithmetic]

    def measure(
        self,
        data: RetrievalSet,
        dims: Sequence[int],
        arithmetic: Arithmetic,
        *,
        progress: bool = False,
    ) -> SetQuality:
        """The recorded retrieval quality on a set, or on some of its queries.

        Raises:
            InputError: The set, a query or a dimension was not recorded.
        """
        self.check_set(data)
        assert self.data is not None
        whole = self.qualities[arithmetic]
        if missing := [dim for dim in dims if dim not in whole.measures]:
            raise InputError(
                f"{self.path} has the retrieval quality at {', '.join(map(str, whole.measures))} "
                f"dimensions, not at {missing[0]}"
            )
        number = {query: i for i, query in enumerate(self.data.queries)}
        rows = [number[query] for query in data.queries]
        return SetQuality(
            {
                dim: {name: values[rows] for name, values in whole.measures[dim].items()}
                for dim in dims
            },
            whole.lost[rows],
            whole.lost_documents,
            whole.varies[rows],
        )

    def check_set(self, data: RetrievalSet) -> None:
        """Check that a retrieval set, or the set it is a part of, was recorded.

        Raises:
            InputError: It was not recorded.
        """
        if self.data is None:
            raise InputError(
                f"{self.path} was recorded without a retrieval set: record it with `retrieval`, or "
                "leave the set out"
            )
        given = describe_set(data, self.origin.task)
        changed = [
            query
            for query, digest in given.queries.items()
            if self.data.queries.get(query) != digest
        ]
        if given.documents != self.data.documents or changed:
            what = f"query {changed[0]!r}" if changed else "its documents"
            raise InputError(
                f"{self.path} was recorded on the set {self.data.name} with "
                f"{len(self.data.queries):,} queries; {what} of the set {data.name} given here "
                "differs: give the same set, or record this one"
            )

    def hidden_states(self, rows: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """The recorded hidden states.

        Raises:
            InputError: They belong to other rows.
        """
        if [row.tolist() for row in rows] != [row.tolist() for row in self.layers.rows]:
            raise InputError(
                f"{self.path} has hidden states of other texts than this embedport compares; "
                "record the reference again"
            )
        ends = np.cumsum([len(row) for row in self.layers.rows])[:-1]
        return [np.split(states, ends) for states in self.layers.states]

    def final_norm(self) -> np.ndarray:
        """The gains of the final norm, float32 [hidden_size]."""
        return self.layers.norm

    def settings(self) -> Settings | None:
        """The recorded settings; None if the file has none, as with the next two."""
        return self.declared

    def table(self) -> TableSketch | None:
        """The recorded sketch of the embedding table."""
        return self.sketch

    def tensors(self) -> Tensors | None:
        """The recorded tensors that are not rounded to few bits."""
        return self.plain

    def _check_inputs(self, inputs: Inputs) -> None:
        if list(inputs) != self.inputs:
            raise InputError(f"{self.path} was recorded on other inputs than these")


def describe_set(data: RetrievalSet, task: Task) -> SetRecord:
    """The hashes that identify a retrieval set; candidates count only for a reranker."""

    def digest(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    return SetRecord(
        data.name,
        digest(list(data.documents.items())),
        {
            query: digest(
                [
                    text,
                    sorted(data.relevance[query].items()),
                    list(data.candidates[query]) if task == "reranker" else [],
                ]
            )
            for query, text in data.queries.items()
        },
    )
