"""Token ids of the texts that an export runs, in the task's template, and the reranker's head."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.spec import ModelSpec
from ..checkpoint.tokenizer import check_ids
from ..errors import require
from ..quantize.source import WeightSource
from ..texts.beir import RetrievalSet, read_beir
from ..texts.prompts import EmbeddingTokenizer, RerankerTokenizer, find_answers, resolve_prompt
from ..texts.ranking import candidate_pairs
from ..texts.samples import Sample, builtin_pairs, builtin_samples, read_pairs, read_samples


def reranker_head(weights: WeightSource) -> np.ndarray:
    """W_yes - W_no, float32 [hidden_size, 1].

    Raises:
        CheckpointError: "yes" or "no" is not a token.
    """
    return weights.answer_row(*find_answers(weights.spec))[:, None]


def tokenize_samples(
    spec: ModelSpec, max_length: int, calibration: str | Path | None
) -> list[np.ndarray]:
    """Token ids of the calibration texts in the task's template, int64 [tokens] each.

    Raises:
        CheckpointError: The tokenizer gives ids beyond the embedding table.
    """
    path = spec.source.pipeline / "tokenizer.json"
    if spec.task == "reranker":
        pairs = read_pairs(calibration) if calibration else builtin_pairs()
        tokenizer = RerankerTokenizer(path, max_length, spec.inputs)
        rows = tokenizer.encode([(pair.query, pair.document) for pair in pairs]).ids
        check_ids(np.concatenate(rows), spec.vocab_size, path, "ids of texts")
        return rows
    texts = read_samples(calibration) if calibration else builtin_samples()
    tokenizer = EmbeddingTokenizer(path, max_length, spec.inputs)
    rows = [row for text in texts for row in _encode(tokenizer, spec, text)]
    check_ids(np.concatenate(rows), spec.vocab_size, path, "ids of texts")
    return rows


def tokenize_retrieval(
    spec: ModelSpec, max_length: int, folder: str | Path
) -> tuple[RetrievalSet, list[np.ndarray]]:
    """A retrieval set and its token ids: queries and documents, or a reranker's candidates.

    Args:
        spec: The checkpoint's spec.
        max_length: Tokens after which a text is truncated.
        folder: A folder in the BEIR layout, or "builtin".

    Returns:
        (the set; token ids, int64 [tokens] each, as in `RankingTarget.rows`).

    Raises:
        InputError: The set is incomplete, or has no candidates for a reranker.
        MissingPackageError: ir-measures is not installed.
    """
    data = read_beir(folder)
    require("ir_measures", "retrieval")  # fails before the long work
    path = spec.source.pipeline / "tokenizer.json"
    if spec.task == "reranker":
        return data, RerankerTokenizer(path, max_length, spec.inputs).encode(
            candidate_pairs(data)
        ).ids
    tokenizer = EmbeddingTokenizer(path, max_length, spec.inputs)
    samples = [Sample(text, "query") for text in data.queries.values()]
    samples += [Sample(text, "document") for text in data.documents.values()]
    return data, [row for sample in samples for row in _encode(tokenizer, spec, sample)]


def _encode(tokenizer: EmbeddingTokenizer, spec: ModelSpec, sample: Sample) -> list[np.ndarray]:
    prompt = sample.prompt
    if prompt == "query" and prompt not in spec.prompts and spec.prompts:
        # The model has only prompts of other names: spread queries over them by a hash.
        names = sorted(spec.prompts)
        prompt = names[sum(sample.text.encode()) % len(names)]
    return tokenizer.encode([sample.text], resolve_prompt(spec.inputs, prompt)).ids


def describe_calibration(
    rows: Sequence[np.ndarray], calibration: str | Path | None
) -> dict[str, Any]:
    """The manifest's record of the calibration texts: their hash, not the texts.

    Args:
        rows: Token ids, int64 [tokens] each.
        calibration: The texts' file; None for the built-in texts.
    """
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row)).tobytes())
        digest.update(np.ascontiguousarray(row, np.int64).tobytes())
    return {
        "source": Path(calibration).name if calibration else "built-in",
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "sha256": digest.hexdigest(),
    }
