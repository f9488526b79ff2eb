"""Export a checkpoint to an ONNX artifact: written in one pass, verified, then moved into place."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...artifact.folder import Artifact, check_place, staged, write_manifest
from ...artifact.manifest import GraphRecord, Manifest
from ...checkpoint.spec import ModelSpec, Task
from ...checkpoint.weights import Weights
from ...errors import EmbedportError, InputError, require
from ...integrity import record_files
from ...quantize.formats import AUTO, FP8, MIXED, QUANTIZED, parse_formats, plan_formats
from ...quantize.recipe import STORED, Recipe
from ...quantize.rtn import quantize_rtn
from ...quantize.source import WeightSource
from ...quantize.stored import (
    StoredWeights,
    check_readable,
    find_stored,
    open_weights,
    warn_of_activations,
)
from ..calibration.fp16_overflow import choose_fp16, measure_activations
from ..calibration.gptq_awq import kept_bytes, kept_layers
from ..calibration.search import RankingTarget, Search, search_formats
from ..companions import write_companions
from ..configuration import fetch_weights, read_configuration
from ..graph.dialect_table import find_dialect
from ..graph.precision import FLOAT, FLOAT16, Precision, find_precision, weight_bytes
from ..graph.qwen3 import Design, build_model
from ..provenance import Progress, counted, source_record, versions
from ..texts import reranker_head, tokenize_retrieval, tokenize_samples
from .apply_recipe import apply_recipe, describe_calibration, quantize_rows, rotated, stored_recipe
from .continuation import plan_continuation, write_continuation
from .verify import verify_continuation, verify_graph
from .witness import make_witness

logger = logging.getLogger(__name__)

GRAPH = "onnx/model.onnx"
DATA = "model.onnx_data"
# Massive activations appear in a text's first tokens; a reranker's document begins near token 65.
# Verification has the same limit: the standard dialect's attention holds all pairs' scores.
CALIBRATION_TOKENS = {"embedding": 64, "reranker": 160}
MIN_COSINE = 0.999
# Precisions that take a quantized checkpoint's codes unchanged, by the codes' bits.
STORED_BITS = {"int4": 4, "int8-weight": 8}
PACKAGES = ("embedport", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    task: Task | None = None,
    adapter: str | Path | None = None,
    precision: str = "fp32",
    arithmetic: str | None = None,
    dialect: str = "ort",
    outputs: str = "pooled",
    dim: int | None = None,
    max_length: int | None = None,
    calibration: str | Path | None = None,
    algorithm: str | None = None,
    fast: bool = False,
    rotate: bool | None = None,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    recipe: str | Path | None = None,
    min_cosine: float | None = None,
    max_ndcg_loss: float | None = None,
    retrieval: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Artifact:
    """Export a Qwen3 embedding or reranker checkpoint to an ONNX artifact.

    The graph takes `input_ids` and `attention_mask`, both int64 [batch, sequence], padded on
    either side. It returns `sentence_embedding`, float32 [batch, dim] of unit length, or `score`,
    float32 [batch], the probability of "yes". Weights are read, converted and written one at a
    time; memory holds one layer.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id. A checkpoint quantized to 4 or 8
            bits in groups of 32, 64 or 128 keeps its codes, bit for bit, in "int4" or
            "int8-weight"; other quantized checkpoints are dequantized.
        output: The artifact's folder; it appears only when it is complete and checked.
        revision: A branch, tag or commit, for a hub id.
        task: "embedding" or "reranker", if the checkpoint's files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.
        precision: "fp32"; "fp16" (parts that would overflow stay in fp32, found by calibration);
            "bf16" (fp32 residual stream); "int8" (8-bit weights and activations, one activation
            scale per token); "fp8" (the same in float8, standard dialect only); "int8-weight" or
            "int4" (weights in groups); or "auto" (4 bits, 8 bits or fp32 for each matrix: the
            smallest choice that keeps `min_cosine`, `max_ndcg_loss` or both).
        arithmetic: A quantized graph's compute dtype: "fp32", for CPUs, or "bf16", for GPUs (with
            an fp32 residual stream). Default: bf16 for "fp8", otherwise fp32.
        dialect: "ort" (onnxruntime's fused operators) or "standard" (ONNX opset 23 only).
        outputs: "pooled", or "hidden" for `last_hidden_state`, float32 [batch, sequence,
            hidden_size], which sentence-transformers' ONNX backend reads.
        dim: Leading values of the embedding to keep (MRL). Default: all; `encode` can truncate.
        max_length: Default limit of a text's tokens; longer texts are truncated. Default: the
            model's own limit.
        calibration: Texts (.txt, .jsonl) or pairs (.jsonl) instead of the built-in ones, for fp16,
            GPTQ, AWQ and "auto".
        algorithm: The quantization algorithm: "rtn", "mse", "gptq", "gptaq", "awq", "awq+gptq" or
            "awq+gptaq". Default: "gptaq" for "int4" and "auto", otherwise "rtn".
        fast: For "int4": round to nearest in smaller groups, in seconds instead of minutes.
        rotate: Whether to rotate the residual stream and attention heads before quantizing, to
            spread outliers. Default: both for "int8", heads alone for "int8-weight", "int4" and
            "auto", where they cost nothing.
        group_size: Inputs that share a scale, 32, 64 or 128, for "int8-weight" and "int4".
        embedding_bits: The embedding table's bits, 4 or 8.
        recipe: Path of a recipe.json, or of the embedport.json of an artifact to reproduce.
            Replaces `precision` and all quantization options.
        min_cosine: For "auto": the smallest allowed cosine of a text to the fp32 model. Default:
            0.999 if `max_ndcg_loss` is not given.
        max_ndcg_loss: For "auto": the largest allowed loss of nDCG@10 against the fp32 model, on
            `retrieval`.
        retrieval: A folder in the BEIR layout, or "builtin". A reranker needs candidates in it.
        force: Whether to replace an existing artifact.
        progress: Called with (stage, done, total).

    Raises:
        InputError: An option is wrong, the output exists, or the disk is too small.
        CheckpointError: The checkpoint is not a complete Qwen3 checkpoint.
        MissingPackageError: onnxruntime is not installed, or ir-measures for `retrieval`.
        VerificationError: The written graph does not run or outputs NaN.
    """
    output = Path(output).expanduser().absolute()
    # Weights may be gigabytes to download: first check everything that does not need them.
    spec = read_configuration(checkpoint, revision, task, adapter)
    check_readable(spec)
    chosen_dialect = find_dialect(dialect)
    _check_options(spec, outputs, dim, max_length)
    _check_targets(precision, min_cosine, max_ndcg_loss, retrieval)
    plan = _plan_recipe(
        spec,
        precision,
        dialect,
        recipe,
        arithmetic=arithmetic,
        algorithm=algorithm,
        fast=fast,
        rotate=rotate,
        group_size=group_size,
        embedding_bits=embedding_bits,
    )
    # The precision's name in the manifest.
    precision_name = MIXED if recipe is not None or precision == AUTO else precision
    runs_texts = plan is not None and plan.is_calibrated
    if calibration is not None and not runs_texts and precision not in ("fp16", AUTO):
        raise InputError(
            f"this export in {precision_name} runs no texts: --calibration goes with --precision "
            "fp16 and auto, and with --algorithm gptq, gptaq and awq"
        )
    max_length = max_length or spec.max_length
    rows = tokenize_samples(spec, max_length, calibration)
    dtypes = _choose_precision(spec, precision_name, plan, dialect)
    if plan is not None and runs_texts:
        _check_texts(plan, rows, calibration)
    ranking_inputs = None if retrieval is None else tokenize_retrieval(spec, max_length, retrieval)
    require("onnxruntime", "cpu")
    check_place(output, force)
    spec = fetch_weights(spec)
    weights = open_weights(spec)
    warn_of_activations(spec)
    if isinstance(weights, StoredWeights):
        requantizes = any(option is not None for option in (algorithm, rotate, group_size))
        bits = STORED_BITS.get(precision)
        if plan is not None and bits is not None and not requantizes and weights.gives_codes(bits):
            plan = stored_recipe(weights, plan)
            dtypes = _choose_precision(spec, precision_name, plan, dialect)
        if precision == AUTO or (plan is not None and plan.algorithm != STORED):
            _warn_of_second_rounding(weights, precision_name)
    needed_bytes = weight_bytes(spec, dtypes) + _file_sizes(spec, ".json") + (64 << 20)
    if plan is not None and plan.compensation is not None:
        needed_bytes += kept_bytes(spec, rows)
    with (
        kept_layers(output, used=runs_texts) as layers,
        staged(output, force=force, needs=needed_bytes) as folder,
    ):
        source: WeightSource = weights
        matrices = search = None
        if precision == AUTO:
            source = rotated(weights, rotate=bool(rotate))
            ranking = None
            if ranking_inputs is not None and max_ndcg_loss is not None:
                head = reranker_head(weights) if spec.task == "reranker" else None
                ranking = RankingTarget(*ranking_inputs, head, max_ndcg_loss)
            search = search_formats(
                Design(source, chosen_dialect, dtypes),
                lambda name, scheme: quantize_rows(source, name, scheme, quantize_rtn),
                rows,
                MIN_COSINE if min_cosine is None and ranking is None else min_cosine,
                ranking,
                folder,
                counted(progress, "search", spec.num_layers),
            )
            plan = Recipe(search.formats, rotate=bool(rotate))
            dtypes = _choose_precision(spec, precision_name, plan, dialect)
        if plan is not None:
            passes = plan.scales + (plan.compensation is not None)
            advance = counted(progress, "quantize", spec.num_layers * passes)
            source, matrices = apply_recipe(weights, plan, dtypes.formats, rows, layers, advance)
        elif dtypes.compute == FLOAT16:
            dtypes = _calibrate(weights, rows, folder, progress)
        head = reranker_head(source) if spec.task == "reranker" else None
        design = Design(source, chosen_dialect, dtypes, outputs == "hidden", dim, head, matrices)
        model = build_model(design)
        write_companions(spec, folder)
        _write_graph(model, folder / GRAPH, progress)
        continuation = plan_continuation(design)
        # A graph's parts: inputs, table, layers, output. A continuation has one more, its states.
        parts = spec.num_layers + 3
        # The graph runs for the verification and the witness; the continuation in two halves.
        total = 2 * parts + 2 * (parts + 1) * bool(continuation)
        advance = counted(progress, "verify", total)
        with ThreadPoolExecutor(max_workers=1) as hashing:
            # Hashes are cached: those for the manifest are ready when the verification ends.
            hashing.submit(record_files, [(folder / GRAPH).with_name(DATA), *weights.files])
            ids = rows[0][: CALIBRATION_TOKENS[spec.task]]
            expected = verify_graph(folder / GRAPH, ids, lambda scope: advance())
            if continuation is not None:
                continuation_path = folder / continuation.path
                write_continuation(design, folder / GRAPH, continuation_path)
                verify_continuation(continuation_path, ids, expected, lambda scope: advance())
        manifest = Manifest(
            task=spec.task,
            format="onnx",
            precision=precision_name,
            graph=GraphRecord(
                path=GRAPH,
                dialect=dialect,
                opset=chosen_dialect.opsets[""],
                inputs=design.inputs,
                outputs=tuple(str(value.name) for value in model.graph.outputs),
                output=outputs,
                arithmetic=dtypes.arithmetic,
                kept_in_fp32=dtypes.kept_in_fp32,
                masked=bool(spec.masked_layers),
                continuation=continuation,
                limits_pairs=any(format.scheme.limits_pairs for format in dtypes.formats.values()),
            ),
            embedding_dim=(dim or spec.embedding_dim) if spec.task == "embedding" else None,
            hidden_size=spec.hidden_size,
            num_heads=spec.num_heads,
            vocab_size=spec.vocab_size,
            max_length=max_length,
            max_position_embeddings=spec.max_position_embeddings,
            inputs=spec.inputs,
            outputs=spec.outputs,
            source=source_record(weights),
            requires=chosen_dialect.requires,
            versions=versions(PACKAGES),
            files={},
            recipe=_recipe_record(plan, search, rows, calibration),
        )
        make_witness(folder, manifest, lambda scope: advance())
        write_manifest(folder, manifest, output.name)
    return Artifact.open(output)


def _warn_of_second_rounding(weights: StoredWeights, precision: str) -> None:
    if weights.formats:
        logger.warning(
            "%s: its matrices (%s) are unpacked and quantized again, to %s, which adds a second "
            "rounding error; give the original checkpoint, or --precision fp32, fp16 or bf16, "
            "which add none",
            weights.spec.source.id,
            " and ".join(weights.describe()),
            precision,
        )


def _recipe_record(
    plan: Recipe | None,
    search: Search | None,
    rows: list[np.ndarray],
    calibration: str | Path | None,
) -> dict[str, Any] | None:
    if plan is None:
        return None
    runs_texts = search is not None or plan.is_calibrated
    return {
        **plan.to_record(),
        "calibration": describe_calibration(rows, calibration) if runs_texts else None,
        "search": None if search is None else search.to_record(),
    }


def _check_options(spec: ModelSpec, outputs: str, dim: int | None, max_length: int | None) -> None:
    if outputs not in ("pooled", "hidden"):
        raise InputError(f"output should be pooled or hidden, found {outputs!r}")
    if spec.task == "reranker" and (outputs == "hidden" or dim is not None):
        raise InputError("a reranker gives scores: it takes neither --output hidden nor --dim")
    if outputs == "hidden" and dim is not None:
        raise InputError("--dim shortens the pooled embedding; --output hidden has none")
    if dim is not None and not 1 <= dim <= spec.embedding_dim:
        raise InputError(f"dim should be from 1 to {spec.embedding_dim}, found {dim}")
    if max_length is not None and not 1 <= max_length <= spec.max_position_embeddings:
        raise InputError(
            f"max_length should be from 1 to {spec.max_position_embeddings}, found {max_length}"
        )


def _check_targets(
    precision: str,
    min_cosine: float | None,
    max_ndcg_loss: float | None,
    retrieval: str | Path | None,
) -> None:
    targets = {"--min-cosine": min_cosine, "--max-ndcg-loss": max_ndcg_loss}
    for name, value in (*targets.items(), ("--retrieval", retrieval)):
        if value is not None and precision != AUTO:
            raise InputError(f"{name} goes with --precision auto, not with {precision}")
    if (max_ndcg_loss is None) != (retrieval is None):
        raise InputError("--max-ndcg-loss and --retrieval go together: give both or neither")
    if min_cosine is not None and not 0 < min_cosine <= 1:
        raise InputError(f"min_cosine should be above 0 and at most 1, found {min_cosine}")
    if max_ndcg_loss is not None and not 0 <= max_ndcg_loss <= 1:
        raise InputError(f"max_ndcg_loss should be from 0 to 1, found {max_ndcg_loss}")


def _plan_recipe(
    spec: ModelSpec,
    precision: str,
    dialect: str,
    recipe: str | Path | None,
    *,
    arithmetic: str | None,
    algorithm: str | None,
    fast: bool,
    rotate: bool | None,
    group_size: int | None,
    embedding_bits: int | None,
) -> Recipe | None:
    """Choose how a graph is quantized; None if it is not, or if "auto" will search for it.

    Arguments as for `export_onnx`. If a quantized checkpoint keeps its own codes, the recipe
    applies to everything else: see `stored_recipe`.

    Raises:
        InputError: Options conflict, or the recipe's file is not a recipe.
    """
    sets_algorithm = algorithm is not None or rotate is not None or fast
    sets_format = any(option is not None for option in (arithmetic, group_size, embedding_bits))
    if recipe is not None:
        if sets_algorithm or sets_format or precision != "fp32":
            raise InputError("a recipe decides everything: give no other option of quantization")
        return Recipe.from_file(Path(recipe))
    if precision == MIXED:
        raise InputError("precision mixed comes from a recipe or --precision auto: use one of them")
    if precision in QUANTIZED:
        formats = plan_formats(
            spec,
            precision,
            dialect=dialect,
            group_size=group_size,
            embedding_bits=embedding_bits,
            fast=fast,
        )
        if algorithm is None:
            algorithm = "gptaq" if precision == "int4" and not fast else "rtn"
        # Only GPUs multiply float8, so the rest computes in 16 bits.
        default = "bf16" if precision == FP8 else "fp32"
        plan = Recipe(
            {name: str(format) for name, format in formats.items()},
            algorithm,
            rotate=precision == "int8" if rotate is None else rotate,
            rotate_heads=rotate is None and precision in STORED_BITS,
            balance=precision == "int8",
            arithmetic=default if arithmetic is None else arithmetic,
        )
        if _gives_codes(spec, precision) and (sets_algorithm or group_size is not None):
            raise InputError(
                f"{spec.source.id} is quantized to {STORED_BITS[precision]} bits already, and its "
                "own codes are taken: give none of --algorithm, --rotate and --group-size"
            )
        return plan
    if sets_format or (sets_algorithm and precision != AUTO):
        raise InputError(
            f"precision {precision!r} takes none of --algorithm, --rotate, --group-size, "
            "--embedding-bits and --arithmetic: leave them out, or use them with --precision "
            f"{', '.join(QUANTIZED)}"
        )
    if precision == AUTO and dialect != "ort":
        raise InputError("--precision auto measures with onnxruntime's operators: --dialect ort")
    return None


def _gives_codes(spec: ModelSpec, precision: str) -> bool:
    """Whether a precision takes the checkpoint's codes unchanged, by the checkpoint's config."""
    stored, bits = find_stored(spec), STORED_BITS.get(precision)
    return stored is not None and bits is not None and stored.graph_bits == bits


def _choose_precision(
    spec: ModelSpec, precision: str, plan: Recipe | None, dialect: str
) -> Precision:
    """The dtypes and formats of a graph."""
    if plan is None:
        return find_precision(precision)
    dtypes = find_precision(precision, plan.arithmetic)
    dtypes = replace(dtypes, formats=parse_formats(spec, plan.formats, dialect))
    _check_quantized(plan, dtypes, dialect)
    return dtypes


def _check_texts(plan: Recipe, rows: list[np.ndarray], calibration: str | Path | None) -> None:
    """Refuse calibration texts that differ from those that the recipe was made with."""
    recorded, current = plan.calibration, describe_calibration(rows, calibration)
    if recorded is not None and recorded["sha256"] != current["sha256"]:
        raise InputError(
            f"the recipe was calibrated on texts from {recorded['source']}, and those from "
            f"{current['source']} give other tokens: give the same with --calibration and, if it "
            'was given, --max-length; or take "calibration" out of the recipe to calibrate anew'
        )


def _check_quantized(plan: Recipe, precision: Precision, dialect: str) -> None:
    formats = precision.formats.values()
    if any(format.float8 for format in formats) and plan.algorithm != "rtn":
        raise InputError(f"fp8 is rounded to nearest: it takes no --algorithm {plan.algorithm}")
    if (
        dialect == "ort"
        and precision.compute != FLOAT
        and any(format.activations for format in formats)
    ):
        raise InputError(
            "onnxruntime multiplies int8 activations on CPUs only: --precision int8 with "
            "--arithmetic bf16 goes with --dialect standard"
        )


def _calibrate(
    weights: Weights, rows: list[np.ndarray], folder: Path, progress: Progress
) -> Precision:
    layers = weights.spec.num_layers
    largest = measure_activations(
        weights,
        [row[: CALIBRATION_TOKENS[weights.spec.task]] for row in rows],
        folder,
        counted(progress, "calibrate", layers),
    )
    return choose_fp16(largest, layers)


def _write_graph(model: ir.Model, path: Path, progress: Progress) -> None:
    path.parent.mkdir()
    try:
        ir.save(
            model,
            path,
            external_data=DATA,
            max_workers=2,  # one converts a tensor while the other's goes to the disk
            callback=lambda tensor, info: progress("write", info.index + 1, info.total),
        )
    except ir.serde.SerdeError as error:
        # Small tensors are read while the graph is serialized, and onnx-ir wraps what that raises.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, EmbedportError):
            cause = cause.__cause__
        raise cause or error from None


def _file_sizes(spec: ModelSpec, suffix: str) -> int:
    return sum(path.stat().st_size for path in spec.source.folder.glob(f"*{suffix}"))
