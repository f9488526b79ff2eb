"""The loss by quantization on the demo's retrieval set, which shares no text with calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import embedport
from embedport.texts.beir import BUILTIN, read_beir
from embedport.texts.ranking import NDCG, measure, rank_documents
from embedport.validation.retrieval import bootstrap

# Rows of token ids to unit vectors, float32 [rows, dim].
Embed = Callable[[Sequence[np.ndarray]], np.ndarray]
# Digits after the point, where they are not four.
DIGITS = {"MB": 2, "seconds": 0, "mean": 5, "mean difference": 5}


class HeldOut:
    """The demo's retrieval set, and the results of an fp32 graph on it.

    Args:
        folder: The fp32 artifact.
    """

    def __init__(self, folder: Path) -> None:
        self.data = read_beir(BUILTIN)
        embedder = embedport.load_embedder(folder, device="cpu")
        self.rows = [
            row
            for texts, prompt in ((self.data.queries, "query"), (self.data.documents, "document"))
            for row in embedder.tokenizer.encode(
                list(texts.values()), embedder.prompt_text(prompt)
            ).ids
        ]
        self.vectors = embedder.embed_rows(self.rows)
        self.ndcg = self._measure(self.vectors)

    def figures(self, embed: Embed) -> dict[str, float]:
        """Cosines to fp32, and the loss of nDCG@10 with its bootstrap interval over queries."""
        vectors = embed(self.rows)
        cosines = (vectors.astype(np.float64) * self.vectors).sum(axis=1)
        loss = self.ndcg - self._measure(vectors)
        low, high = bootstrap(loss)
        return {
            "minimum cosine": float(cosines.min()),
            "mean": float(cosines.mean()),
            "loss of nDCG@10": float(loss.mean()),
            "from": low,
            "to": high,
        }

    def _measure(self, vectors: np.ndarray) -> np.ndarray:
        count = len(self.data.queries)
        pair = (vectors[:count], vectors[count:])
        ranking = rank_documents(pair, vectors.shape[1], self.data)
        return measure(ranking, self.data.relevance, (NDCG,))[NDCG]


def table_rows(figures: Mapping[str, Mapping[str, Any]], columns: Sequence[str]) -> list[list[str]]:
    """Rows of a table: name, and a cell for each column, empty if a row lacks it."""
    rows = []
    for name, row in figures.items():
        values = {**row, "MB": row["bytes"] / 1e6}
        cells = (
            f"{values[key]:.{DIGITS.get(key, 4)}f}" if key in values else "" for key in columns
        )
        rows.append([name, *cells])
    return rows
