"""Token ids of the texts that an export runs, in the task's template, and the reranker's head."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.spec import ModelSpec
from ..checkpoint.tokenizer import check_ids
from ..errors import require
from ..files import check_name
from ..quantize.formats import TABLE, matrices
from ..quantize.recipe import Recipe
from ..quantize.source import WeightSource
from ..runtimes.batching import group_indices
from ..texts.beir import RetrievalSet, read_beir
from ..texts.prompts import EmbeddingTokenizer, RerankerTokenizer, find_answers, resolve_prompt
from ..texts.ranking import candidate_pairs
from ..texts.samples import Sample, read_pairs, read_samples
from .calibration.builtin import calibration_pairs, calibration_samples

logger = logging.getLogger(__name__)

# Tokens for each input of a matrix that a Hessian should be computed from. With fewer tokens than
# inputs it is singular; ten times as many leave its small eigenvalues about right.
TOKENS_PER_INPUT = 10
# Built-in texts or pairs that are enough where nothing is rounded by them.
FEW = 64
# The value of `calibration` for all built-in texts.
BUILTIN = "builtin"
# Tokens of the built-in texts that a CPU runs by default: a model of 0.6B takes some six minutes
# with them on two cores, and a quarter of an hour with all.
CPU_TOKENS = 8192


def reranker_head(weights: WeightSource) -> np.ndarray:
    """W_yes - W_no, float32 [hidden_size, 1].

    Raises:
        CheckpointError: "yes" or "no" is not a token.
    """
    return weights.answer_row(*find_answers(weights.spec))[:, None]


def tokenize_samples(
    spec: ModelSpec,
    max_length: int,
    calibration: str | Path | None,
    *,
    count: int | None = None,
    most_tokens: int | None = None,
) -> list[np.ndarray]:
    """Token ids of the calibration texts in the task's template, int64 [tokens] each.

    Args:
        spec: The checkpoint's spec.
        max_length: Tokens after which a text is truncated.
        calibration: The texts' file; None for the built-in texts within `count` and `most_tokens`,
            `BUILTIN` for all of them.
        count: Number of built-in texts, from the first; None for all.
        most_tokens: The most tokens of built-in texts, from the first text; None for all.

    Raises:
        CheckpointError: The tokenizer gives ids beyond the embedding table.
    """
    path = spec.source.pipeline / "tokenizer.json"
    check_name(Path(BUILTIN if calibration is None else calibration).name)  # the manifest has it
    if str(calibration) == BUILTIN:
        calibration, count, most_tokens = None, None, None
    if spec.task == "reranker":
        pairs = calibration_pairs()[:count] if calibration is None else read_pairs(calibration)
        tokenizer = RerankerTokenizer(path, max_length, spec.inputs)
        texts = [(pair.query, pair.document) for pair in pairs]
        rows = _encode_each(tokenizer, texts, [pair.instruction for pair in pairs])
    else:
        samples = (
            calibration_samples()[:count] if calibration is None else read_samples(calibration)
        )
        rows = encode_samples(EmbeddingTokenizer(path, max_length, spec.inputs), spec, samples)
    if calibration is None and most_tokens is not None:
        within = np.cumsum([len(row) for row in rows]) <= most_tokens
        rows = rows[: max(1, int(within.sum()))]
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
    return data, encode_samples(tokenizer, spec, samples)


def encode_samples(
    tokenizer: EmbeddingTokenizer, spec: ModelSpec, samples: Sequence[Sample]
) -> list[np.ndarray]:
    """Token ids of texts, each after its prompt, int64 [tokens] each.

    Raises:
        InputError: A prompt's name is unknown, or a text gives no token.
    """
    prompts = [_prompt_text(spec, sample) for sample in samples]
    return _encode_each(tokenizer, [sample.text for sample in samples], prompts)


def _encode_each(
    tokenizer: Any, inputs: Sequence[Any], prompts: Sequence[str | None]
) -> list[np.ndarray]:
    """Token ids of texts or pairs, each with its own prompt or instruction."""
    rows: dict[int, np.ndarray] = {}
    for prompt, group in group_indices(prompts).items():
        rows.update(
            zip(group, tokenizer.encode([inputs[i] for i in group], prompt).ids, strict=True)
        )
    return [rows[i] for i in range(len(inputs))]


def _prompt_text(spec: ModelSpec, sample: Sample) -> str:
    prompt = sample.prompt
    if prompt == "query" and prompt not in spec.prompts and spec.prompts:
        # The model has only prompts of other names: spread queries over them by a hash.
        names = sorted(spec.prompts)
        prompt = names[sum(sample.text.encode()) % len(names)]
    return resolve_prompt(spec.inputs, prompt)


def advised_tokens(spec: ModelSpec, names: Sequence[str] | None = None) -> tuple[str, int, int]:
    """The calibration tokens that a model's Hessians should be computed from.

    Args:
        spec: The checkpoint's spec.
        names: The matrices that are quantized; None for all projections.

    Returns:
        (the matrix with the most inputs, the number of its inputs, `TOKENS_PER_INPUT` times that).
    """
    shapes = spec.tensor_shapes()
    inputs = {
        name: shapes[f"{name}.weight"][1] for name in names or matrices(spec) if name != TABLE
    }
    largest = max(inputs, key=inputs.__getitem__)
    return largest, inputs[largest], TOKENS_PER_INPUT * inputs[largest]


def warn_of_few_tokens(spec: ModelSpec, recipe: Recipe | None, rows: Sequence[np.ndarray]) -> None:
    """Warn if GPTQ or GPTAQ would compute a Hessian from too few tokens.

    Args:
        spec: The checkpoint's spec.
        recipe: How it is quantized, if it is; without formats, all projections are.
        rows: Token ids of the calibration texts, int64 [tokens] each.
    """
    if recipe is None or recipe.compensation is None:
        return
    names = [name for name in recipe.formats if name != TABLE]
    if recipe.formats and not names:
        return
    (name, inputs, advised), tokens = advised_tokens(spec, names), sum(map(len, rows))
    # `embedport calibration` ends before the text that would exceed what is advised.
    if tokens < 0.9 * advised:
        logger.warning(
            "the calibration has %s tokens, and %s, the largest matrix, has %s inputs: %s tokens "
            "are advised, %d for each; give `calibration` a file of your texts, which `embedport "
            "calibration` makes, or %s for all built-in texts",
            f"{tokens:,}",
            name,
            f"{inputs:,}",
            f"{advised:,}",
            TOKENS_PER_INPUT,
            BUILTIN,
        )


def describe_calibration(
    rows: Sequence[np.ndarray], calibration: str | Path | None
) -> dict[str, Any]:
    """The manifest's record of the calibration texts: their hash, not the texts.

    Args:
        rows: Token ids, int64 [tokens] each.
        calibration: The texts' file; None or `BUILTIN` for the built-in texts.
    """
    named = BUILTIN if calibration is None else Path(calibration).name
    digest = hashlib.sha256()
    for row in rows:
        digest.update(np.int64(len(row)).tobytes())
        digest.update(np.ascontiguousarray(row, np.int64).tobytes())
    return {
        "source": "built-in" if named == BUILTIN else named,
        "texts": len(rows),
        "tokens": sum(map(len, rows)),
        "sha256": digest.hexdigest(),
    }
