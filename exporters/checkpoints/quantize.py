"""Quantize a checkpoint: written in one pass, reopened to check it, then moved into place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ...artifact.folder import Artifact, check_place, staged, write_manifest
from ...artifact.layout import turn_into_classifier, write_json
from ...artifact.manifest import Manifest
from ...bitsandbytes_ import importing_bitsandbytes
from ...checkpoint.lora import open_floats
from ...checkpoint.spec import ModelSpec, Task
from ...checkpoint.tensor_files import read_headers
from ...checkpoint.weights import Weights
from ...errors import CheckpointError, InputError, VerificationError, require
from ...quantize.formats import matrices
from ...quantize.recipe import Recipe
from ...quantize.schemes import ScaleDtype
from ...quantize.source import WeightSource, row_ranges
from ..calibration.engines import check_device
from ..calibration.gptq_awq import kept_bytes, kept_layers
from ..companions import write_companions
from ..configuration import fetch_weights, read_configuration
from ..estimate import Estimate, describe_recipe, estimate_cost
from ..provenance import Progress, counted, source_record, versions
from ..texts import (
    CPU_TOKENS,
    describe_calibration,
    reranker_head,
    tokenize_samples,
    warn_of_few_tokens,
)
from .config import FORMS, Form, checkpoint_config, gptq_config
from .matrices import Quantize, apply_plan, check_finite
from .methods import Options, Plan, plan_method, stored_bytes
from .serving import write_serving_files
from .shards import ShardWriter

PACKAGES = ("embedport", "numpy", "torch", "transformers", "bitsandbytes", "compressed-tensors")
# fp32 checkpoints are written in bf16, which has the range that Qwen3's activations need.
KEPT: dict[str, ScaleDtype] = {"BF16": "bfloat16", "F16": "float16", "F32": "bfloat16"}
# The packages that write a library's format.
NEEDED = {
    "bitsandbytes": ("torch", "transformers", "bitsandbytes"),
    "compressed-tensors": ("torch", "compressed_tensors"),
    "gptq": (),
}
# Most tensors per matrix: bitsandbytes' double quantization has six.
PARTS = 6
# Disk for everything but weights.
SPARE_BYTES = 64 << 20
HEADS = ("lm_head.weight", "score.weight")
CALIBRATED = "gptq and awq, and without `fast` with w8a8 and bnb-nf4"


def quantize_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    method: str,
    revision: str | None = None,
    task: Task | None = None,
    adapter: str | Path | None = None,
    bits: int | None = None,
    group_size: int | None = None,
    double_quant: bool = False,
    symmetric: bool = False,
    fast: bool = False,
    form: Form | None = None,
    calibration: str | Path | None = None,
    device: str = "cpu",
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Artifact:
    """Quantize a Qwen3 embedding or reranker checkpoint to a checkpoint that other libraries load.

    Projections are quantized; norms, the embedding table and a reranker's head stay in 16 bits.
    Weights are read, quantized and written one at a time; memory holds one layer.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id; not quantized yet.
        output: The artifact's folder; it appears only when it is complete and checked.
        method: "bnb-int8" or "bnb-nf4", for bitsandbytes; "gptq", AutoGPTQ's format; "awq" (4-bit
            weights), "w8a8" (int8 weights and activations) or "fp8" (e4m3 weights and
            activations), for compressed-tensors.
        revision: A branch, tag or commit, for a hub id.
        task: "embedding" or "reranker", if the checkpoint's files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.
        bits: A weight's bits, 4 or 8, for "gptq"; 4 by default.
        group_size: Inputs that share a scale, 32, 64 or 128, for "gptq" and "awq"; 128 by default.
        double_quant: Whether the scales of "bnb-nf4" are quantized too.
        symmetric: Whether "awq" stores no zero points, for readers that take none.
        fast: Whether "gptq" and "awq" are those algorithms alone, and "w8a8" and "bnb-nf4" are
            rounded to nearest: quicker, and worse. By default "gptq" and "bnb-nf4" are GPTAQ, and
            "awq" and "w8a8" are AWQ's and SmoothQuant's scaling with GPTAQ's rounding; for a
            reranker GPTQ in GPTAQ's place.
        form: A reranker's form: "causal-lm", its own, or "sequence-classification", with one logit
            W_yes - W_no.
        calibration: Texts (.txt, .jsonl) or pairs (.jsonl) instead of the built-in ones, for
            "bnb-nf4", "gptq", "awq" and "w8a8".
        device: Where these run the texts and round: "cpu", or "cuda", in torch.
        force: Whether to replace an existing artifact.
        progress: Called with (stage, done, total).

    Raises:
        InputError: An option is wrong, the output exists, or the disk is too small.
        CheckpointError: The checkpoint is not a complete Qwen3 checkpoint, is quantized already, or
            holds NaN or infinity.
        MissingPackageError: The format's library is not installed, or onnxruntime, which runs the
            calibration texts.
        DeviceError: torch has no CUDA device here, for `device` cuda.
        VerificationError: The written files lack tensors or hold others.

    >>> artifact = quantize_checkpoint(checkpoint, folder / "tea-fp8", method="fp8")
    >>> artifact.manifest.format, artifact.manifest.precision
    ('checkpoint', 'fp8')
    """
    output = Path(output).expanduser().absolute()
    options = Options(
        method=method,
        bits=bits,
        group_size=group_size,
        double_quant=double_quant,
        symmetric=symmetric,
        fast=fast,
        form=form,
        calibration=calibration,
        device=device,
    )
    # Weights may be gigabytes to download: first check everything that does not need them.
    spec = read_configuration(checkpoint, revision, task, adapter)
    plan, chosen_form, rows = _plan(spec, options)
    check_place(output, force)
    spec = fetch_weights(spec)
    weights = open_floats(spec)
    plan = replace(plan, dtype=KEPT[weights.tensors["embed_tokens.weight"].dtype])
    needed_bytes, recipe = _weight_bytes(spec, plan, chosen_form) + SPARE_BYTES, _recipe(spec, plan)
    if recipe.compensation is not None:
        needed_bytes += kept_bytes(spec, rows)
    with (
        kept_layers(output, used=plan.is_calibrated) as layers,
        staged(output, force=force, needs=needed_bytes) as folder,
    ):
        advance = counted(progress, "quantize", spec.num_layers * recipe.passes)
        source, quantize = apply_plan(weights, plan, rows, layers, advance, device)
        write_companions(spec, folder)
        write_json(folder / "config.json", checkpoint_config(spec, plan, chosen_form))
        if plan.method.library == "gptq":
            write_json(folder / "quantize_config.json", gptq_config(plan))
        if chosen_form == "sequence-classification":
            turn_into_classifier(folder)
        write_serving_files(spec, chosen_form, folder, output.name)
        _write_tensors(folder, plan, chosen_form, source, quantize, progress)
        spec.source.check_unchanged()
        write_manifest(
            folder,
            _manifest(weights, plan, describe_calibration(rows, calibration) if rows else None),
            output.name,
        )
    return Artifact.open(output)


def estimate_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    options: Options,
    *,
    revision: str | None = None,
    task: Task | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
) -> Estimate:
    """Plan a quantization and estimate its cost; writes nothing, and downloads only JSON.

    Args:
        checkpoint: A folder in the hub's layout, or a hub id.
        output: The folder that the artifact would have.
        options: The options that decide what is written.
        revision: A branch, tag or commit.
        task: "embedding" or "reranker".
        adapter: A LoRA adapter.
        force: Whether an existing artifact may be replaced.

    Raises:
        InputError, CheckpointError, MissingPackageError: As `quantize_checkpoint`.
    """
    spec = read_configuration(checkpoint, revision, task, adapter)
    plan, form, rows = _plan(spec, options)
    check_place(Path(output).expanduser().absolute(), force)
    if spec.source.is_local:
        spec = fetch_weights(spec)
        open_floats(spec)
    recipe, size = _recipe(spec, plan), _weight_bytes(spec, plan, form)
    steps = [f"{spec.source.id}: {spec.task}, {plan.name}, for {plan.method.requires}"]
    uses_torch = "torch" in NEEDED[plan.method.library]
    memory, seconds = estimate_cost(spec, recipe, rows, size, torch=uses_torch)
    return Estimate((*steps, *describe_recipe(recipe, rows, spec.task)), size, memory, seconds)


def _plan(spec: ModelSpec, options: Options) -> tuple[Plan, Form | None, list[np.ndarray]]:
    """Check the options, all that does not need the weights.

    Returns:
        (the plan, a reranker's form, token ids of the calibration texts).
    """
    plan = plan_method(spec, options)
    calibration, device = options.calibration, options.device
    if spec.quantization is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: the checkpoint is quantized already, by "
            f"{spec.quantization.method!r}; give the original in bf16, fp16 or fp32"
        )
    form = _choose_form(spec, options.form)
    for option, is_given in (("calibration", calibration is not None), ("device", device != "cpu")):
        if is_given and not plan.is_calibrated:
            raise InputError(
                f"`method` {plan.name} runs no texts{' with `fast`' if plan.method.fast else ''}: "
                f"`{option}` goes with {CALIBRATED}"
            )
    check_device(device)
    with importing_bitsandbytes():
        for package in NEEDED[plan.method.library]:
            require(package, "quantize")
    if not plan.is_calibrated:
        return plan, form, []
    require("onnxruntime", "cpu")
    most_tokens = CPU_TOKENS if device == "cpu" else None
    rows = tokenize_samples(spec, spec.max_length, calibration, most_tokens=most_tokens)
    warn_of_few_tokens(spec, _recipe(spec, plan), rows)
    return plan, form, rows


def _choose_form(spec: ModelSpec, form: str | None) -> Form | None:
    if spec.task == "embedding":
        if form is not None:
            raise InputError(f"an embedding checkpoint has one form: leave `form` {form} out")
        return None
    if form not in (None, *FORMS):
        raise InputError(f"form should be one of {', '.join(FORMS)}, found {form!r}")
    if spec.score_rows is not None:
        if form == "causal-lm":
            raise InputError(
                f"{spec.source.id} is a classifier and has no head for words: leave `form` out"
            )
        return "sequence-classification"
    if form == "sequence-classification" and spec.inputs.form == "text":
        raise InputError(
            f"{spec.source.id} joins pairs in its tokenizer, and a classifier would look for their "
            "end at another token: leave `form` out"
        )
    return "causal-lm" if form is None else form


def _write_tensors(
    folder: Path,
    plan: Plan,
    form: Form | None,
    source: WeightSource,
    quantize: Quantize,
    progress: Progress,
) -> None:
    spec = source.spec
    prefix = "" if spec.task == "embedding" else "model."
    shapes = spec.tensor_shapes()
    quantized = set(matrices(spec))
    dtype = np.dtype(plan.dtype)
    advance = counted(progress, "write", len(shapes))
    with ShardWriter(folder, len(shapes) * PARTS) as shards:
        for name, shape in shapes.items():
            advance()
            matrix = name.removesuffix(".weight")
            if matrix in quantized:
                for part, tensor in quantize(matrix).items():
                    shards.add(f"{prefix}{matrix}.{part}", check_finite(source, name, tensor))
            elif name not in HEADS or form != "sequence-classification":
                stored = name if name in HEADS else prefix + name
                shards.add_rows(stored, dtype, shape, _pieces(source, name, shape, dtype))
        if form == "sequence-classification":
            row = reranker_head(source).T.astype(dtype)
            shards.add(HEADS[1], check_finite(source, HEADS[1], row))
    stored_names = read_headers(folder).keys()
    if stored_names != shards.names:
        wrong_names = ", ".join(sorted(stored_names ^ shards.names)[:3])
        raise VerificationError(f"{folder}: tensors lost or added while writing: {wrong_names}")


def _pieces(
    source: WeightSource, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """A tensor in ranges of rows."""
    for rows in row_ranges(shape):
        yield check_finite(source, name, source.read_fp32(name, rows).astype(dtype))


def _weight_bytes(spec: ModelSpec, plan: Plan, form: Form | None) -> int:
    """The bytes of all tensors."""
    # A classifier has one row of its own.
    total = 2 * spec.hidden_size if form == "sequence-classification" else 0
    quantized = set(matrices(spec))
    for name, shape in spec.tensor_shapes().items():
        if name.removesuffix(".weight") in quantized:
            total += stored_bytes(plan, (shape[0], shape[1]))
        elif name not in HEADS or form != "sequence-classification":
            total += 2 * math.prod(shape)
    return total


def _manifest(weights: Weights, plan: Plan, calibration: dict[str, Any] | None) -> Manifest:
    spec = weights.spec
    return Manifest(
        task=spec.task,
        format="checkpoint",
        precision=plan.precision,
        graph=None,
        embedding_dim=spec.embedding_dim if spec.task == "embedding" else None,
        hidden_size=spec.hidden_size,
        num_heads=spec.num_heads,
        vocab_size=spec.vocab_size,
        max_length=spec.max_length,
        max_position_embeddings=spec.max_position_embeddings,
        inputs=spec.inputs,
        outputs=spec.outputs,
        source=source_record(weights),
        requires=plan.method.requires,
        versions=versions(PACKAGES),
        files={},
        recipe={
            **_recipe(spec, plan).to_record(),
            "calibration": calibration,
            "search": None,
        },
    )


def _recipe(spec: ModelSpec, plan: Plan) -> Recipe:
    return Recipe(
        dict.fromkeys(matrices(spec), str(plan)),
        plan.algorithm,
        rotate_heads=plan.rotate_heads,
        balance=plan.name == "w8a8" and plan.algorithm == "rtn",
    )
