"""Plan an export: which options go together, and what they decide before any weight is read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoint.spec import ModelSpec
from ...checkpoint.weights import Weights
from ...checks import check_numbers
from ...errors import InputError
from ...quantize.formats import AUTO, FP8, MIXED, QUANTIZED, parse_formats, plan_formats
from ...quantize.recipe import AUTO_ALGORITHM, BY_TASK, STORED, Recipe
from ...quantize.stored import StoredWeights, check_readable, find_stored
from ..calibration.engines import check_device
from ..calibration.search import RankingTarget, Search, Target, smallest_bytes
from ..graph.dialect import Dialect
from ..graph.dialect_table import find_dialect
from ..graph.precision import FLOAT, Precision, find_precision, weight_bytes
from ..texts import (
    CPU_TOKENS,
    FEW,
    describe_calibration,
    tokenize_retrieval,
    tokenize_samples,
)
from .apply_recipe import stored_recipe
from .consumers import Shared, plan_shared

logger = logging.getLogger(__name__)

MIN_COSINE = 0.999
# Precisions that take a quantized checkpoint's codes unchanged, by the codes' bits.
STORED_BITS = {"int4": 4, "int8-weight": 8}


@dataclass(frozen=True)
class Options:
    """The options of `export` that decide what is in the graph; named and explained there.

    Raises:
        InputError: An option should be a number and is not, or is out of range; options of a
            search are wrong, or do not go together.
    """

    precision: str = "fp32"
    arithmetic: str | None = None
    dialect: str = "ort"
    outputs: str = "pooled"
    dim: int | None = None
    max_length: int | None = None
    calibration: str | Path | None = None
    device: str = "cpu"
    algorithm: str | None = None
    fast: bool = False
    rotate: bool | None = None
    group_size: int | None = None
    embedding_bits: int | None = None
    recipe: str | Path | None = None
    min_cosine: float | None = None
    max_ndcg_loss: float | None = None
    retrieval: str | Path | None = None
    max_bytes: int | None = None
    average_bits: float | None = None
    consumers: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_numbers(self, "dim", "max_length", "group_size", "embedding_bits")
        _check_search(self)

    @property
    def sets_algorithm(self) -> bool:
        """Whether an algorithm or a rotation is asked for."""
        return self.algorithm is not None or self.rotate is not None or self.fast

    @property
    def sets_format(self) -> bool:
        """Whether a part of the formats is asked for."""
        return any(
            option is not None for option in (self.arithmetic, self.group_size, self.embedding_bits)
        )


@dataclass(frozen=True)
class Plan:
    """An export's decisions.

    Attributes:
        spec: The checkpoint's spec.
        dialect: The graph's operators.
        name: The precision's name in the manifest.
        precision: The graph's dtypes and formats.
        recipe: How the matrices are quantized; None if they are not, or not before the search.
        max_length: Tokens after which a text is truncated.
        rows: Token ids of the calibration texts, int64 [tokens] each.
        target: What the search keeps; None without a search.
        options: What was asked for.
    """

    spec: ModelSpec
    dialect: Dialect
    name: str
    precision: Precision
    recipe: Recipe | None
    max_length: int
    rows: list[np.ndarray]
    target: Target | None = None
    options: Options = field(default_factory=Options)

    @property
    def planned(self) -> Recipe | None:
        """The recipe, which of a search has no formats yet."""
        return self.recipe if self.target is None else self.target.recipe

    @property
    def is_calibrated(self) -> bool:
        """Whether GPTQ or AWQ runs the calibration texts."""
        return self.planned is not None and self.planned.is_calibrated

    @property
    def shared(self) -> Shared:
        """The files for other software.

        Raises:
            InputError: Software cannot read the model in this precision and dialect.
        """
        return plan_shared(
            self.spec,
            self.options.consumers,
            self.dialect,
            self.name,
            self.precision,
            self.options.outputs,
            self.options.dim,
        )

    def quantized_by(self, recipe: Recipe) -> Plan:
        """The same plan with a recipe, and the dtypes and formats that it gives.

        Raises:
            InputError: The recipe does not fit the model or the dialect.
        """
        precision = _quantized_precision(self.spec, self.name, recipe, self.dialect.name)
        return replace(self, recipe=recipe, precision=precision)

    def recipe_record(self, search: Search | None) -> dict[str, Any] | None:
        """The manifest's record of the recipe, with what the search found."""
        if self.recipe is None:
            return None
        runs_texts = search is not None or self.is_calibrated
        return {
            **self.recipe.to_record(),
            "calibration": describe_calibration(self.rows, self.options.calibration)
            if runs_texts
            else None,
            "search": None if search is None else search.to_record(),
        }


def plan_export(spec: ModelSpec, options: Options) -> Plan:
    """Check the options together, and decide all that the weights themselves do not.

    Args:
        spec: The checkpoint's spec; its weights need not be on disk.
        options: The options of `export`.

    Raises:
        InputError: An option is wrong, or does not go with another or with the checkpoint.
        CheckpointError: The checkpoint is quantized in a way that is not read, or its tokenizer
            gives ids beyond the embedding table.
        MissingPackageError: ir-measures is not installed, for `retrieval`; or torch, for `device`
            cuda.
        DeviceError: torch has no CUDA device here, for `device` cuda.
    """
    check_readable(spec)
    find_precision(options.precision)  # refuses an unknown name
    dialect = find_dialect(options.dialect)
    _check_outputs(spec, options)
    searches = options.precision == AUTO
    recipe = _choose_recipe(spec, options)
    # A recipe names its formats itself.
    name = MIXED if options.recipe is not None or searches else options.precision
    runs_texts = recipe is not None and recipe.is_calibrated
    if options.calibration is not None and not (
        runs_texts or searches or options.precision == "fp16"
    ):
        raise InputError(
            f"this export in {name} runs no texts: `calibration` goes with `precision` fp16 and "
            "auto, and with `algorithm` gptq, gptaq and awq"
        )
    max_length = options.max_length or spec.max_length
    count = None if runs_texts or searches else FEW
    if recipe is not None and recipe.calibration is not None:
        recorded = recipe.calibration.get("texts")
        count = max(1, recorded) if isinstance(recorded, int) else None
    rows = tokenize_samples(
        spec,
        max_length,
        options.calibration,
        count=count,
        # A search measures each matrix on the CPU.
        most_tokens=CPU_TOKENS if count is None and (options.device == "cpu" or searches) else None,
    )
    if recipe is None:
        precision = find_precision(name)
    else:
        precision = _quantized_precision(spec, name, recipe, dialect.name)
        if runs_texts:
            _check_texts(recipe, rows, options.calibration)
    plan = Plan(
        spec=spec,
        dialect=dialect,
        name=name,
        precision=precision,
        recipe=recipe,
        target=_choose_target(spec, options, max_length) if searches else None,
        max_length=max_length,
        rows=rows,
        options=options,
    )
    if options.device != "cpu" and not plan.is_calibrated:
        raise InputError(
            f"this export in {name} rounds without texts: `device` goes with `precision` int4 and "
            "auto, and with `algorithm` gptq, gptaq and awq"
        )
    check_device(options.device)
    _ = plan.shared  # refuses what the consumers cannot read
    return plan


def adopt_codes(plan: Plan, weights: Weights) -> Plan:
    """Take a quantized checkpoint's own codes if the plan keeps them; otherwise warn.

    Args:
        plan: The plan, made from the checkpoint's configuration.
        weights: The checkpoint's weights.
    """
    if not isinstance(weights, StoredWeights):
        return plan
    recipe, options = plan.recipe, plan.options
    bits = STORED_BITS.get(options.precision)
    takes_codes = not (options.sets_algorithm or options.group_size is not None)
    if recipe is not None and takes_codes and bits is not None and weights.gives_codes(bits):
        plan = plan.quantized_by(stored_recipe(weights, recipe))
    is_rounded_again = plan.target is not None or (
        plan.recipe is not None and plan.recipe.algorithm != STORED
    )
    if is_rounded_again and weights.formats:
        logger.warning(
            "%s: its matrices (%s) are unpacked and quantized again, to %s, which adds a second "
            "rounding error; give the original checkpoint, or `precision` fp32, fp16 or bf16, "
            "which add none",
            weights.spec.source.id,
            " and ".join(weights.describe()),
            AUTO if plan.target is not None else plan.name,
        )
    return plan


def _check_outputs(spec: ModelSpec, options: Options) -> None:
    outputs, dim, max_length = options.outputs, options.dim, options.max_length
    if outputs not in ("pooled", "hidden"):
        raise InputError(f"outputs should be pooled or hidden, found {outputs!r}")
    if spec.task == "reranker" and (outputs == "hidden" or dim is not None):
        raise InputError("a reranker gives scores: it takes neither `outputs` hidden nor `dim`")
    if outputs == "hidden" and dim is not None:
        raise InputError("`dim` shortens the pooled embedding; `outputs` hidden has none")
    if dim is not None and not 1 <= dim <= spec.embedding_dim:
        raise InputError(f"dim should be from 1 to {spec.embedding_dim}, found {dim}")
    shortest = 2 if spec.task == "reranker" else 1  # a query and a document
    if max_length is not None and not shortest <= max_length <= spec.max_position_embeddings:
        raise InputError(
            f"max_length should be from {shortest} to {spec.max_position_embeddings}, found "
            f"{max_length}"
        )


def _check_search(options: Options) -> None:
    precision = options.precision
    if precision == AUTO and options.dialect != "ort" and not options.sets_format:
        raise InputError("`precision` auto measures with onnxruntime's operators: `dialect` ort")
    for name, value in (
        ("`min_cosine`", options.min_cosine),
        ("`max_ndcg_loss`", options.max_ndcg_loss),
        ("`retrieval`", options.retrieval),
        ("`max_bytes`", options.max_bytes),
        ("`average_bits`", options.average_bits),
    ):
        if value is not None and precision != AUTO:
            raise InputError(f"{name} goes with `precision` auto, not with {precision}")
    if (options.max_ndcg_loss is None) != (options.retrieval is None):
        raise InputError("`max_ndcg_loss` and `retrieval` go together: give both or neither")
    if options.max_bytes is not None and options.average_bits is not None:
        raise InputError("`max_bytes` and `average_bits` say the same: give one of them")


def _choose_target(spec: ModelSpec, options: Options, max_length: int) -> Target:
    min_cosine, ranking, max_bytes = options.min_cosine, None, options.max_bytes
    algorithm = options.algorithm
    if algorithm is None:
        algorithm = "rtn" if options.fast else AUTO_ALGORITHM
    recipe = Recipe({}, algorithm, rotate=bool(options.rotate), rotate_heads=options.rotate is None)
    plain = find_precision("fp32")
    if options.average_bits is not None:
        max_bytes = int(options.average_bits * weight_bytes(spec, plain) / 32)
    smallest = smallest_bytes(spec, plain, recipe)
    if max_bytes is not None and max_bytes < smallest:
        given = (
            f"`max_bytes` is {max_bytes:,}"
            if options.average_bits is None
            else f"`average_bits` {options.average_bits:g} is {max_bytes:,}"
        )
        raise InputError(f"the smallest choice takes {smallest:,} bytes, and {given}; allow more")
    if options.retrieval is not None and options.max_ndcg_loss is not None:
        data, rows = tokenize_retrieval(spec, max_length, options.retrieval)
        ranking = RankingTarget(data, rows, options.max_ndcg_loss)
    elif min_cosine is None and max_bytes is None:
        min_cosine = MIN_COSINE
    return Target(min_cosine, ranking, max_bytes, recipe)


def _choose_recipe(spec: ModelSpec, options: Options) -> Recipe | None:
    """How the graph is quantized; None if it is not, or if a search will decide it.

    If a quantized checkpoint keeps its own codes, the recipe is for everything else: see
    `stored_recipe`.
    """
    precision = options.precision
    if options.recipe is not None:
        if options.sets_algorithm or options.sets_format or precision != "fp32":
            raise InputError("a recipe decides everything: give no other option of quantization")
        return Recipe.from_file(Path(options.recipe))
    if precision == MIXED:
        raise InputError("precision mixed comes from a recipe or `precision` auto: use one of them")
    if precision not in QUANTIZED:
        if options.sets_format or (options.sets_algorithm and precision != AUTO):
            # A search chooses the formats, and takes an algorithm and a rotation.
            taken = "" if precision == AUTO else "`algorithm`, `rotate`, `fast`, "
            raise InputError(
                f"precision {precision!r} takes none of {taken}`group_size`, `embedding_bits` and "
                f"`arithmetic`: leave them out, or use them with `precision` {', '.join(QUANTIZED)}"
            )
        return None
    formats = plan_formats(
        spec,
        precision,
        dialect=options.dialect,
        group_size=options.group_size,
        embedding_bits=options.embedding_bits,
        fast=options.fast,
    )
    algorithm = options.algorithm
    if algorithm is None:
        algorithm = BY_TASK[spec.task] if precision == "int4" and not options.fast else "rtn"
    # Only GPUs multiply float8, so the rest computes in 16 bits.
    default = "bf16" if precision == FP8 else "fp32"
    recipe = Recipe(
        {name: str(format) for name, format in formats.items()},
        algorithm,
        rotate=precision == "int8" if options.rotate is None else options.rotate,
        rotate_heads=precision in STORED_BITS and options.rotate is None,
        balance=precision == "int8" and not algorithm.startswith("smoothquant"),
        arithmetic=default if options.arithmetic is None else options.arithmetic,
    )
    if gives_codes(spec, precision) and (
        options.sets_algorithm
        or options.group_size is not None
        or options.calibration is not None
        or options.device != "cpu"
    ):
        raise InputError(
            f"{spec.source.id} is quantized to {STORED_BITS[precision]} bits already, and its "
            "own codes are taken: give none of `algorithm`, `rotate`, `fast`, `group_size`, "
            "`calibration` and `device`"
        )
    return recipe


def gives_codes(spec: ModelSpec, precision: str) -> bool:
    """Whether a precision takes the checkpoint's codes unchanged, by the checkpoint's config."""
    stored, bits = find_stored(spec), STORED_BITS.get(precision)
    return stored is not None and bits is not None and stored.graph_bits == bits


def _quantized_precision(spec: ModelSpec, name: str, recipe: Recipe, dialect: str) -> Precision:
    """The dtypes and formats of a quantized graph."""
    precision = find_precision(name, recipe.arithmetic)
    precision = replace(precision, formats=parse_formats(spec, recipe.formats, dialect))
    formats = precision.formats.values()
    if any(format.float8 for format in formats) and recipe.algorithm != "rtn":
        raise InputError(f"fp8 is rounded to nearest: it takes no `algorithm` {recipe.algorithm}")
    if (
        dialect == "ort"
        and precision.compute != FLOAT
        and any(format.activations for format in formats)
    ):
        raise InputError(
            "onnxruntime multiplies int8 activations on CPUs only: `precision` int8 with "
            "`arithmetic` bf16 goes with `dialect` standard"
        )
    return precision


def _check_texts(recipe: Recipe, rows: list[np.ndarray], calibration: str | Path | None) -> None:
    """Refuse calibration texts that differ from those that the recipe was made with."""
    recorded, current = recipe.calibration, describe_calibration(rows, calibration)
    if recorded is not None and recorded["sha256"] != current["sha256"]:
        raise InputError(
            f"the recipe was calibrated on texts from {recorded['source']}, and those from "
            f"{current['source']} give other tokens: give the same with `calibration` and, if it "
            'was given, `max_length`; or take "calibration" out of the recipe to calibrate anew'
        )
