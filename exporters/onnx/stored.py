"""A quantized checkpoint's own codes as a graph, for `load` on a CPU.

The graph computes what the checkpoint's values give: MatMulNBits takes its codes, scales and zero
points, the embedding table keeps its 16 bits, and activations are not rounded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir

from ...artifact.folder import Artifact, staged, write_manifest
from ...quantize.formats import parse_formats
from ...quantize.recipe import STORED, Recipe
from ...quantize.stored import StoredWeights
from ..graph.ort_dialect import UnroundedOrtDialect
from ..graph.precision import PRECISIONS, weight_bytes
from ..graph.qwen3 import Design
from ..texts import reranker_head, tokenize_samples
from .apply_recipe import apply_recipe, stored_recipe
from .continuation import plan_continuation
from .export import write_graphs
from .plan import Plan


def export_stored(weights: StoredWeights, output: Path) -> Artifact:
    """Write a graph of a quantized checkpoint's codes.

    The folder has no tokenizer and no witness: the checkpoint's own files stay in use.

    Args:
        weights: The checkpoint's weights; a graph can hold the codes of all its projections.
        output: The folder, which must not exist.

    Raises:
        InputError: The folder cannot be written, or the disk is too small.
        CheckpointError: A tensor or the tokenizer does not fit.
        VerificationError: The written graph does not run or outputs NaN.
    """
    plan = _plan(weights)
    assert plan.recipe is not None
    with staged(output, force=False, needs=weight_bytes(plan.spec, plan.precision)) as folder:
        source, matrices = apply_recipe(
            weights, plan.recipe, plan.precision.formats, plan.rows, folder, lambda: None
        )
        head = reranker_head(source) if plan.spec.task == "reranker" else None
        design = Design(source, plan.dialect, plan.precision, head=head, matrices=matrices)
        continuation = plan_continuation(design)
        manifest = write_graphs(
            plan,
            design,
            weights,
            continuation,
            None,
            folder,
            lambda stage, done, total: None,
            lambda: None,
        )
        plan.spec.source.check_unchanged()
        write_manifest(folder, manifest, output.name)
    return Artifact.open(output)


def _plan(weights: StoredWeights) -> Plan:
    spec = weights.spec
    recipe = stored_recipe(weights, Recipe({}, STORED))
    table = weights.tensors["embed_tokens.weight"].dtype  # "F16", "BF16" or "F32"
    dialect = UnroundedOrtDialect()
    return Plan(
        spec=spec,
        dialect=dialect,
        name=weights.quantization.precision,
        precision=replace(
            PRECISIONS["fp32"],
            formats=parse_formats(spec, recipe.formats, dialect.name),
            table=ir.DataType.from_short_name(table.lower()),
        ),
        recipe=recipe,
        max_length=spec.max_length,
        rows=tokenize_samples(spec, spec.max_length, None, count=1),
    )
