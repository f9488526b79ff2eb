"""A checkpoint becomes an artifact with an ONNX graph: in one pass, checked, then put in place."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...artifact import Artifact, check_place, staged, write_manifest
from ...errors import EmbedportError, InputError, require
from ...integrity import record_files
from ...manifest import GraphRecord, Manifest
from ...quantize.rtn import quantize_rtn
from ...quantize.source import WeightSource
from ...quantize.stored import (
    StoredWeights,
    check_readable,
    find_stored,
    open_weights,
    warn_of_activations,
)
from ...spec import ModelSpec, Task
from ...weights import Weights
from ..configuration import fetch_weights, read_configuration
from ..provenance import Progress, counted, source_record, versions
from .calibrated import kept_bytes, kept_layers
from .calibration import choose_fp16, measure_activations
from .companions import write_companions
from .continuation import plan_continuation, write_continuation
from .dialects import find_dialect
from .formats import AUTO, FP8, MIXED, QUANTIZED, parse_formats, plan_formats
from .graph import Design, build_model
from .precision import FLOAT, FLOAT16, Precision, find_precision, weight_bytes
from .quantization import (
    carry_out,
    describe_calibration,
    quantize_rows,
    rotated,
    stored_recipe,
)
from .recipe import CALIBRATED, STORED, Recipe
from .search import RankingTarget, Search, search_formats
from .texts import reranker_head, tokenize_retrieval, tokenize_samples
from .verify import verify_continuation, verify_graph
from .witness import make_witness

logger = logging.getLogger(__name__)

GRAPH = "onnx/model.onnx"
DATA = "model.onnx_data"
# Massive activations show in a text's first tokens; a reranker's document begins after some 65.
# The check runs no more either: the standard dialect holds the scores of all pairs of tokens.
CALIBRATION_TOKENS = {"embedding": 64, "reranker": 160}
MIN_COSINE = 0.999
# The precision that takes a quantized checkpoint's codes as they are.
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
    algorithm: str = "rtn",
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

    The graph takes `input_ids` and `attention_mask`, both int64 [batch, sequence], with padding on
    either side, and gives `sentence_embedding`, float32 [batch, dim] of unit length, or `score`,
    float32 [batch], the probability of "yes". Weights are read, converted and written one at a
    time; memory stays at one layer.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id; one that is quantized to 4 or 8 bits
            in groups of 32, 64 or 128 gives its own codes, bit for bit, to "int4" or
            "int8-weight", and any other that is read is unpacked.
        output: The artifact's folder; it appears only when it is complete and checked.
        revision: A branch, tag or commit, for a hub id.
        task: "embedding" or "reranker", for a checkpoint whose files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.
        precision: "fp32"; "fp16" (what would overflow stays in fp32, found by calibration); "bf16"
            (the residual stream stays in fp32); "int8" (weights and each token's activations);
            "fp8" (the same in float8, standard dialect only); "int8-weight" or "int4" (weights in
            groups); or "auto" (4 bits, 8 bits or fp32 for each matrix: the smallest choice that
            keeps `min_cosine`, `max_ndcg_loss` or both).
        arithmetic: What a quantized graph computes in: "fp32", for CPUs, or "bf16", for GPUs (the
            residual stream stays in fp32); by default fp32, and bf16 for "fp8".
        dialect: "ort" (onnxruntime's fused operators) or "standard" (ONNX opset 23 only).
        outputs: "pooled", or "hidden" for `last_hidden_state`, float32 [batch, sequence,
            hidden_size], which sentence-transformers' ONNX backend opens.
        dim: Leading values of the embedding to keep (MRL); by default all, and `encode` chooses.
        max_length: Tokens after which a text is cut by default; the model's own if not given.
        calibration: Texts (.txt, .jsonl) or pairs (.jsonl) instead of the built-in ones, for fp16,
            GPTQ, AWQ and "auto".
        algorithm: Of a quantized precision: "rtn", "hqq", "gptq" or "awq"; "auto" takes "rtn".
        rotate: Whether to rotate the residual stream before quantizing, against outliers; by
            default for "int8".
        group_size: Inputs that share a scale, 32, 64 or 128, for "int8-weight" and "int4".
        embedding_bits: Of the embedding table, 4 or 8.
        recipe: recipe.json, or the embedport.json of an artifact that is to be made again: decides
            instead of `precision` and the options of quantization.
        min_cosine: For "auto": the smallest cosine of a text to the fp32 model; 0.999 by default
            where `max_ndcg_loss` is not given.
        max_ndcg_loss: For "auto": how much less nDCG@10 than the fp32 model's, on `retrieval`.
        retrieval: A folder in the BEIR layout, or "builtin"; a reranker's needs candidates.
        force: Whether to replace an artifact that is already there.
        progress: Called with (stage, done, total) as the work goes on.

    Raises:
        InputError: An option is wrong, the output exists, or the disk is too small.
        CheckpointError: The checkpoint is not a whole Qwen3 checkpoint.
        MissingPackageError: onnxruntime is not installed, or ir-measures for `retrieval`.
        VerificationError: The written graph does not run or gives NaN.
    """
    output = Path(output).expanduser().absolute()
    if precision == AUTO and algorithm != "rtn":
        raise InputError(
            "--precision auto measures matrices that are rounded to nearest: it takes no "
            f"--algorithm {algorithm}; leave it out, or give it with --precision int4"
        )
    # Weights may be gigabytes to download: what can be wrong without them comes first.
    spec = read_configuration(checkpoint, revision, task, adapter)
    check_readable(spec)
    chosen_dialect = find_dialect(dialect)
    _check_options(spec, outputs, dim, max_length)
    _check_targets(precision, min_cosine, max_ndcg_loss, retrieval)
    plan = _plan(
        spec,
        precision,
        dialect,
        recipe,
        arithmetic=arithmetic,
        algorithm=algorithm,
        rotate=rotate,
        group_size=group_size,
        embedding_bits=embedding_bits,
    )
    # What the artifact's is called.
    named = MIXED if recipe is not None or precision == AUTO else precision
    calibrates = plan is not None and plan.algorithm in CALIBRATED
    if calibration is not None and not calibrates and precision not in ("fp16", AUTO):
        raise InputError(
            f"this export in {named} runs no texts: --calibration goes with --precision fp16 "
            f"and auto, and with --algorithm {' and '.join(CALIBRATED)}"
        )
    max_length = max_length or spec.max_length
    rows = tokenize_samples(spec, max_length, calibration)
    chosen = _choose(spec, named, plan, dialect)
    if plan is not None and calibrates:
        _check_texts(plan, rows, calibration)
    retrieved = None if retrieval is None else tokenize_retrieval(spec, max_length, retrieval)
    require("onnxruntime", "cpu")
    check_place(output, force)
    spec = fetch_weights(spec)
    weights = open_weights(spec)
    warn_of_activations(spec)
    if isinstance(weights, StoredWeights):
        asked = algorithm != "rtn" or rotate is not None or group_size is not None
        bits = STORED_BITS.get(precision)
        if plan is not None and bits is not None and not asked and weights.gives_codes(bits):
            plan = stored_recipe(weights, plan)
            chosen = _choose(spec, named, plan, dialect)
        if precision == AUTO or (plan is not None and plan.algorithm != STORED):
            _warn_of_second_rounding(weights, named)
    needs = weight_bytes(spec, chosen) + _size(spec, ".json") + (64 << 20)
    if plan is not None and plan.algorithm == "gptq":
        needs += kept_bytes(spec, rows)
    with (
        kept_layers(output, used=calibrates) as layers,
        staged(output, force=force, needs=needs) as folder,
    ):
        source: WeightSource = weights
        matrices = search = None
        if precision == AUTO:
            source = rotated(weights, rotate=bool(rotate))
            ranking = None
            if retrieved is not None and max_ndcg_loss is not None:
                head = reranker_head(weights) if spec.task == "reranker" else None
                ranking = RankingTarget(*retrieved, head, max_ndcg_loss)
            search = search_formats(
                Design(source, chosen_dialect, chosen),
                lambda name, scheme: quantize_rows(source, name, scheme, quantize_rtn),
                rows,
                MIN_COSINE if min_cosine is None and ranking is None else min_cosine,
                ranking,
                folder,
                counted(progress, "search", spec.num_layers),
            )
            plan = Recipe(search.formats, rotate=bool(rotate))
            chosen = _choose(spec, named, plan, dialect)
        if plan is not None:
            advance = counted(progress, "quantize", spec.num_layers)
            source, matrices = carry_out(weights, plan, chosen.formats, rows, layers, advance)
        elif chosen.compute == FLOAT16:
            chosen = _calibrate(weights, rows, folder, progress)
        head = reranker_head(source) if spec.task == "reranker" else None
        design = Design(source, chosen_dialect, chosen, outputs == "hidden", dim, head, matrices)
        model = build_model(design)
        write_companions(spec, folder)
        _write_graph(model, folder / GRAPH, progress)
        continuation = plan_continuation(design)
        # Inputs, table and output beside the layers; a continuation runs twice and has its states.
        parts = spec.num_layers + 3
        # Verified, then the witness's rows.
        total = 2 * parts + 2 * (parts + 1) * bool(continuation)
        advance = counted(progress, "verify", total)
        with ThreadPoolExecutor(max_workers=1) as hashing:
            # Hashes are remembered: the manifest's are ready when the text has run.
            hashing.submit(record_files, [(folder / GRAPH).with_name(DATA), *weights.files])
            ids = rows[0][: CALIBRATION_TOKENS[spec.task]]
            result = verify_graph(folder / GRAPH, ids, lambda scope: advance())
            if continuation is not None:
                continued = folder / continuation.path
                write_continuation(design, folder / GRAPH, continued)
                verify_continuation(continued, ids, result, lambda scope: advance())
        manifest = Manifest(
            task=spec.task,
            format="onnx",
            precision=named,
            graph=GraphRecord(
                path=GRAPH,
                dialect=dialect,
                opset=chosen_dialect.opsets[""],
                inputs=design.inputs,
                outputs=tuple(str(value.name) for value in model.graph.outputs),
                output=outputs,
                arithmetic=chosen.arithmetic,
                kept_in_fp32=chosen.kept_in_fp32,
                masked=bool(spec.masked_layers),
                continuation=continuation,
                limits_pairs=any(each.scheme.limits_pairs for each in chosen.formats.values()),
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
            "%s: its matrices (%s) are unpacked and quantized again, to %s, which adds an error to "
            "the one that they have; give the original checkpoint, or --precision fp32, fp16 or "
            "bf16, which add none",
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
    runs_texts = search is not None or plan.algorithm in CALIBRATED
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


def _plan(
    spec: ModelSpec,
    precision: str,
    dialect: str,
    recipe: str | Path | None,
    *,
    arithmetic: str | None,
    algorithm: str,
    rotate: bool | None,
    group_size: int | None,
    embedding_bits: int | None,
) -> Recipe | None:
    """How a graph is quantized; None if it is not, or if "auto" is to find that out.

    Arguments as for `export_onnx`. Of a quantized checkpoint that gives its own codes it is what
    goes for all else: see `stored_recipe`.

    Raises:
        InputError: Options do not go together, or the recipe is none.
    """
    quantizes = algorithm != "rtn" or rotate is not None
    given = any(each is not None for each in (arithmetic, group_size, embedding_bits))
    if recipe is not None:
        if quantizes or given or precision != "fp32":
            raise InputError("a recipe decides everything: give no other option of quantization")
        return Recipe.from_file(Path(recipe))
    if precision == MIXED:
        raise InputError("precision mixed is what a recipe or --precision auto makes: take these")
    if precision in QUANTIZED:
        formats = plan_formats(
            spec,
            precision,
            dialect=dialect,
            group_size=group_size,
            embedding_bits=embedding_bits,
        )
        # GPUs multiply float8 and nothing else does: the rest is in 16 bits too.
        usual = "bf16" if precision == FP8 else "fp32"
        plan = Recipe(
            {name: str(each) for name, each in formats.items()},
            algorithm,
            rotate=precision == "int8" if rotate is None else rotate,
            balance=precision == "int8",
            arithmetic=usual if arithmetic is None else arithmetic,
        )
        if _gives_codes(spec, precision) and (quantizes or group_size is not None):
            raise InputError(
                f"{spec.source.id} is quantized to {STORED_BITS[precision]} bits already, and its "
                "own codes are taken: give none of --algorithm, --rotate and --group-size"
            )
        return plan
    if given or (quantizes and precision != AUTO):
        raise InputError(
            f"precision {precision!r} takes none of --algorithm, --rotate, --group-size, "
            "--embedding-bits and --arithmetic that was given; they go with "
            f"{', '.join(QUANTIZED)}"
        )
    if precision == AUTO and dialect != "ort":
        raise InputError("--precision auto measures with onnxruntime's operators: --dialect ort")
    return None


def _gives_codes(spec: ModelSpec, precision: str) -> bool:
    """Whether a checkpoint's configuration promises codes that a precision takes as they are."""
    stored, bits = find_stored(spec), STORED_BITS.get(precision)
    return stored is not None and bits is not None and stored.graph_bits == bits


def _choose(spec: ModelSpec, precision: str, plan: Recipe | None, dialect: str) -> Precision:
    """The dtypes and formats of a graph."""
    if plan is None:
        return find_precision(precision)
    chosen = find_precision(precision, plan.arithmetic)
    chosen = replace(chosen, formats=parse_formats(spec, plan.formats, dialect))
    _check_quantized(plan, chosen, dialect)
    return chosen


def _check_texts(plan: Recipe, rows: list[np.ndarray], calibration: str | Path | None) -> None:
    """A recipe that was carried out on texts is carried out on the same ones again."""
    recorded, found = plan.calibration, describe_calibration(rows, calibration)
    if recorded is not None and recorded["sha256"] != found["sha256"]:
        raise InputError(
            f"the recipe was calibrated on texts from {recorded['source']}, and those from "
            f"{found['source']} give other tokens: give the same with --calibration and, if it was "
            'given, --max-length; or take "calibration" out of the recipe to calibrate anew'
        )


def _check_quantized(plan: Recipe, precision: Precision, dialect: str) -> None:
    formats = precision.formats.values()
    if any(each.float8 for each in formats) and plan.algorithm != "rtn":
        raise InputError(f"fp8 is rounded to nearest: it takes no --algorithm {plan.algorithm}")
    if (
        dialect == "ort"
        and precision.compute != FLOAT
        and any(each.activations for each in formats)
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


def _size(spec: ModelSpec, suffix: str) -> int:
    return sum(path.stat().st_size for path in spec.source.folder.glob(f"*{suffix}"))
