"""Export a checkpoint to an ONNX artifact: plan, prepare, build, verify, publish."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from ...artifact.folder import Artifact, check_place, staged, write_manifest
from ...artifact.manifest import ContinuationRecord, GraphRecord, Manifest, SharedRecord
from ...checkpoint.spec import Task
from ...checkpoint.weights import Weights
from ...errors import require
from ...integrity import record_files
from ...quantize.recipe import STORED
from ...quantize.source import WeightSource
from ...quantize.stored import open_weights, warn_of_activations
from ..calibration.fp16_overflow import choose_fp16, measure_activations
from ..calibration.gptq_awq import kept_bytes, kept_layers
from ..calibration.search import FP32, TRIALS, Search, search_formats
from ..classifier import write_classifier
from ..companions import write_companions
from ..configuration import fetch_weights, read_configuration
from ..estimate import Estimate, describe_recipe, estimate_cost
from ..graph.initializers import QuantizedMatrices
from ..graph.precision import FLOAT16, Precision, weight_bytes
from ..graph.qwen3 import Design, build_model
from ..provenance import Progress, counted, source_record, versions
from ..texts import reranker_head, warn_of_few_tokens
from .apply_recipe import apply_recipe, rotated
from .consumers import verify_shared, write_shared
from .continuation import plan_continuation
from .plan import Options, Plan, adopt_codes, gives_codes, plan_export
from .reader_settings import write_reader_settings
from .saving import save_graph, save_over_weights
from .verify import verify_continuation, verify_graph
from .witness import make_witness

# Massive activations appear in a text's first tokens; a reranker's document begins near token 65.
# Verification has the same limit: the standard dialect's attention holds all pairs' scores.
CALIBRATION_TOKENS = {"embedding": 64, "reranker": 160}
PACKAGES = ("embedport", "onnx", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "numpy")


def export(
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
    device: str = "cpu",
    algorithm: str | None = None,
    fast: bool = False,
    rotate: bool | None = None,
    group_size: int | None = None,
    embedding_bits: int | None = None,
    recipe: str | Path | None = None,
    min_cosine: float | None = None,
    max_ndcg_loss: float | None = None,
    retrieval: str | Path | None = None,
    max_bytes: int | None = None,
    average_bits: float | None = None,
    consumers: Sequence[str] = (),
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
        device: Where GPTQ and AWQ run the texts and round: "cpu", or "cuda", in torch.
        algorithm: The quantization algorithm: "rtn", "mse", "gptq", "gptaq", "awq", "smoothquant"
            (for "int8"), or a scaling and a rounding, such as "awq+gptaq". Default: for
            "int4" "gptaq", of a reranker "awq+gptq"; for "auto" "awq+gptq"; otherwise "rtn".
        fast: For "int4": round to nearest in smaller groups, in seconds instead of minutes.
        rotate: Whether to rotate the residual stream and attention heads before quantizing, to
            spread outliers. Default: both for "int8", heads alone for "int8-weight", "int4" and
            "auto", where they cost nothing.
        group_size: Inputs that share a scale, 32, 64 or 128, for "int8-weight" and "int4".
        embedding_bits: The embedding table's bits, 4 or 8.
        recipe: Path of a recipe.json, or of the embedport.json of an artifact to reproduce.
            Replaces `precision` and all quantization options.
        min_cosine: For "auto": the smallest allowed cosine of a text to the fp32 model. Default:
            0.999 if no other target is given.
        max_ndcg_loss: For "auto": the largest allowed loss of nDCG@10 against the fp32 model, on
            `retrieval`.
        retrieval: A folder in the BEIR layout, or "builtin". A reranker needs candidates in it.
        max_bytes: For "auto": the most bytes of the graph's weights; without another target, the
            best choice within them.
        average_bits: The same, as bits for each of the model's weights, scales included.
        consumers: Other software that will open the artifact: names in `consumers.CONSUMERS`. It
            gets the files, outputs and operator versions that it reads, over the same weights.
        force: Whether to replace an existing artifact.
        progress: Called with (stage, done, total).

    Returns:
        The artifact.

    Raises:
        InputError: An option is wrong, the output exists, or the disk is too small.
        CheckpointError: The checkpoint is not a complete Qwen3 checkpoint.
        MissingPackageError: onnxruntime is not installed, ir-measures for `retrieval`, or torch for
            `device` cuda.
        DeviceError: torch has no CUDA device here, for `device` cuda.
        VerificationError: The written graph does not run or outputs NaN.

    >>> artifact = embedport.export(checkpoint, folder / "tea-int8", precision="int8")
    >>> artifact.manifest.task, artifact.manifest.precision
    ('embedding', 'int8')
    """
    output = Path(output).expanduser().absolute()
    options = Options(
        precision=precision,
        arithmetic=arithmetic,
        dialect=dialect,
        outputs=outputs,
        dim=dim,
        max_length=max_length,
        calibration=calibration,
        device=device,
        algorithm=algorithm,
        fast=fast,
        rotate=rotate,
        group_size=group_size,
        embedding_bits=embedding_bits,
        recipe=recipe,
        min_cosine=min_cosine,
        max_ndcg_loss=max_ndcg_loss,
        retrieval=retrieval,
        max_bytes=max_bytes,
        average_bits=average_bits,
        consumers=consumers,
    )
    # Weights may be gigabytes to download: everything that does not need them is checked first.
    spec = read_configuration(checkpoint, revision, task, adapter)
    plan = plan_export(spec, options)
    require("onnxruntime", "cpu")
    check_place(output, force)
    spec = fetch_weights(spec)
    weights = open_weights(spec)
    warn_of_activations(spec)
    plan = adopt_codes(replace(plan, spec=spec), weights)
    warn_of_few_tokens(plan.spec, plan.planned, plan.rows)
    with (
        kept_layers(output, used=plan.is_calibrated) as layers,
        staged(output, force=force, needs=_needed_bytes(plan)) as folder,
    ):
        plan, design, search = _prepare(plan, weights, layers, folder, progress)
        write_companions(spec, folder)
        if spec.task == "reranker":
            write_classifier(spec, folder)
        write_reader_settings(spec, plan.max_length, folder)
        continuation = plan_continuation(design)
        # A graph's parts: inputs, table, layers, output. A continuation has one more, its states.
        parts = spec.num_layers + 3
        # The graph runs for the verification and the witness; the continuation in two halves.
        steps = 2 * parts + 2 * (parts + 1) * bool(continuation)
        advance = counted(progress, "verify", steps)
        manifest = write_graphs(
            plan, design, weights, continuation, search, folder, progress, advance
        )
        make_witness(folder, manifest, advance)
        spec.source.check_unchanged()
        write_manifest(folder, manifest, output.name)
    return Artifact.open(output)


def write_graphs(
    plan: Plan,
    design: Design,
    weights: Weights,
    continuation: ContinuationRecord | None,
    search: Search | None,
    folder: Path,
    progress: Progress,
    advance: Callable[[], None],
) -> Manifest:
    """Write a design's graphs and their weights into a folder, and verify them.

    Args:
        plan: The finished plan.
        design: The graph's design.
        weights: The checkpoint's weights.
        continuation: From `plan_continuation`.
        search: What the search found; None without one.
        folder: The artifact's folder.
        progress: Called with ("write", done, total).
        advance: Called after each part of a graph that was run.

    Returns:
        The manifest, still without files.

    Raises:
        VerificationError: A graph does not run, or outputs NaN or infinity.
    """
    model = build_model(design)
    graph, data = folder / plan.shared.own, plan.shared.data
    save_graph(model, graph, data, progress)
    with ThreadPoolExecutor(max_workers=1) as hashing:
        # Hashes are cached: those for the manifest are ready when the verification ends.
        hashing.submit(record_files, [graph.with_name(data), *weights.files])
        shared = _verify(plan, design, graph, continuation, advance)
    names = tuple(str(value.name) for value in model.graph.outputs)
    return _manifest(plan, design, weights, names, continuation, shared, search)


def estimate_onnx(
    checkpoint: str | Path,
    output: str | Path,
    options: Options,
    *,
    revision: str | None = None,
    task: Task | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
) -> Estimate:
    """Plan an export and estimate its cost; writes nothing, and downloads only JSON.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id.
        output: The folder that the artifact would have.
        options: The options that decide what is in the graph.
        revision: A branch, tag or commit.
        task: "embedding" or "reranker".
        adapter: A LoRA adapter.
        force: Whether an existing artifact may be replaced.

    Raises:
        InputError, CheckpointError, MissingPackageError: As `export`.
    """
    spec = read_configuration(checkpoint, revision, task, adapter)
    plan = plan_export(spec, options)
    require("onnxruntime", "cpu")
    check_place(Path(output).expanduser().absolute(), force)
    if spec.source.is_local:
        spec = fetch_weights(spec)
        plan = adopt_codes(replace(plan, spec=spec), open_weights(spec))
    elif plan.recipe is not None and gives_codes(spec, options.precision):
        # The hub's weights, which are not downloaded, have the zero points and the table's dtype.
        recipe = replace(plan.recipe, algorithm=STORED, rotate_heads=False)
        plan = replace(plan, recipe=recipe)
    warn_of_few_tokens(plan.spec, plan.planned, plan.rows)
    recipe, size = plan.planned, _weight_bytes(plan)
    steps = [f"{spec.source.id}: {spec.task}, {plan.name}, {plan.dialect.name} dialect"]
    if plan.target is not None:
        size = min(plan.target.max_bytes or size, size)
        steps.append("measure each matrix in 4 bits, and choose 4, 8 or 32 bits for each")
        if plan.target.min_cosine is not None or plan.target.ranking is not None:
            steps.append(f"quantize and run up to {TRIALS} whole models")
    if recipe is not None:
        steps += describe_recipe(recipe, plan.rows, spec.task)
    memory, seconds = estimate_cost(spec, recipe, plan.rows, size)
    return Estimate(
        tuple(steps),
        size if plan.target is None or plan.target.max_bytes is not None else None,
        memory,
        seconds * (1 if plan.target is None else 2),
    )


def _needed_bytes(plan: Plan) -> int:
    """Disk that the artifact takes, and the layers that GPTQ keeps beside it."""
    small_files = sum(path.stat().st_size for path in plan.spec.source.folder.glob("*.json"))
    total = _weight_bytes(plan) + small_files + (64 << 20)
    if plan.planned is not None and plan.planned.compensation is not None:
        total += kept_bytes(plan.spec, plan.rows)
    return total


def _weight_bytes(plan: Plan) -> int:
    """The bytes of the weights, about; OpenVINO's model has its own copy of them."""
    rotates = plan.planned is not None and plan.planned.rotate
    return weight_bytes(plan.spec, plan.precision, rotates=rotates) * (1 + plan.shared.openvino)


def _prepare(
    plan: Plan, weights: Weights, layers: Path, folder: Path, progress: Progress
) -> tuple[Plan, Design, Search | None]:
    """Search, quantize or calibrate; return the finished plan, the graph's design, the search.

    Args:
        plan: The export's plan.
        weights: The checkpoint's weights.
        layers: Where GPTQ and AWQ keep finished layers: see `kept_layers`.
        folder: Where a layer's graph may be written while it runs.
        progress: Called with (stage, done, total).
    """
    source: WeightSource = weights
    matrices: QuantizedMatrices | None = None
    search = None
    if plan.target is not None:
        search = _search(plan, weights, folder, progress)
        plan = plan.quantized_by(replace(plan.target.recipe, formats=search.formats))
    if plan.recipe is not None:
        source, matrices = apply_recipe(
            weights,
            plan.recipe,
            plan.precision.formats,
            plan.rows,
            layers,
            counted(progress, "quantize", plan.spec.num_layers * plan.recipe.passes),
            plan.options.device,
        )
    elif plan.precision.compute == FLOAT16:
        plan = replace(plan, precision=_calibrate(plan, weights, folder, progress))
    design = Design(
        source,
        plan.dialect,
        plan.precision,
        plan.options.outputs == "hidden",
        plan.options.dim,
        reranker_head(source) if plan.spec.task == "reranker" else None,
        matrices,
    )
    return plan, design, search


def _search(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Search:
    target, device = plan.target, plan.options.device
    assert target is not None
    if target.ranking is not None and plan.spec.task == "reranker":
        target = replace(target, ranking=replace(target.ranking, head=reranker_head(weights)))
    source = rotated(weights, target.recipe)

    def apply(texts: Mapping[str, str], rows: Sequence[np.ndarray], folder: Path) -> Design:
        formats = {name: text for name, text in texts.items() if text != FP32}
        trial = plan.quantized_by(replace(target.recipe, formats=formats))
        assert trial.recipe is not None
        trial_source, matrices = apply_recipe(
            weights, trial.recipe, trial.precision.formats, rows, folder, lambda: None, device
        )
        return Design(trial_source, plan.dialect, trial.precision, matrices=matrices)

    return search_formats(
        Design(source, plan.dialect, plan.precision),
        apply,
        plan.rows,
        target,
        folder,
        counted(progress, "search", plan.spec.num_layers),
    )


def _calibrate(plan: Plan, weights: Weights, folder: Path, progress: Progress) -> Precision:
    """Find what stays in fp32 in an fp16 graph."""
    largest = measure_activations(
        weights,
        [row[: CALIBRATION_TOKENS[plan.spec.task]] for row in plan.rows],
        folder,
        counted(progress, "calibrate", plan.spec.num_layers),
    )
    return choose_fp16(largest, plan.spec.num_layers)


def _verify(
    plan: Plan,
    design: Design,
    graph: Path,
    continuation: ContinuationRecord | None,
    advance: Callable[[], None],
) -> SharedRecord | None:
    """Run the written graph on one text; write the other graphs and compare them with it."""
    ids = plan.rows[0][: CALIBRATION_TOKENS[plan.spec.task]]
    folder = graph.parent.parent
    expected = verify_graph(graph, ids, advance)
    if continuation is not None:
        path = folder / continuation.path
        save_over_weights(build_model(design, continues=True), graph, path)
        verify_continuation(path, ids, expected, advance)
    record = write_shared(plan.shared, design, folder)
    verify_shared(plan.shared, folder, ids, expected)
    return record


def _manifest(
    plan: Plan,
    design: Design,
    weights: Weights,
    outputs: tuple[str, ...],
    continuation: ContinuationRecord | None,
    shared: SharedRecord | None,
    search: Search | None,
) -> Manifest:
    spec, precision, options = plan.spec, plan.precision, plan.options
    return Manifest(
        task=spec.task,
        format="onnx",
        precision=plan.name,
        graph=GraphRecord(
            path=plan.shared.own,
            dialect=plan.dialect.name,
            opset=plan.dialect.opsets[""],
            inputs=design.inputs,
            outputs=outputs,
            output=options.outputs,
            arithmetic=precision.arithmetic,
            kept_in_fp32=precision.kept_in_fp32,
            masked=bool(spec.masked_layers),
            continuation=continuation,
            limits_pairs=any(format.scheme.limits_pairs for format in precision.formats.values()),
            shared=shared,
        ),
        embedding_dim=(options.dim or spec.embedding_dim) if spec.task == "embedding" else None,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        vocab_size=spec.vocab_size,
        max_length=plan.max_length,
        max_position_embeddings=spec.max_position_embeddings,
        inputs=spec.inputs,
        outputs=spec.outputs,
        source=source_record(weights),
        requires=plan.dialect.requires,
        versions=versions(PACKAGES),
        files={},
        recipe=plan.recipe_record(search),
    )
