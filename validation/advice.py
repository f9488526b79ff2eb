"""Advice after a failed gate: the layer where the error grows, the next better precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..quantize.formats import Format
from ..runtimes import ModelInfo
from ..tables import size_words
from .companions import GATE as FILES
from .graphs import GATE as GRAPHS
from .layers import LayerError, largest_growth
from .reference import Origin
from .report import Gate
from .settings import GATE as SETTINGS
from .table import GATE as ROWS
from .tensors import GATE as TENSORS

TOKENS = "inputs with other token ids"
# What to do about a gate on the folder, which no precision helps.
OF_FOLDER = {
    SETTINGS: "Compare both folders' settings; if the checkpoint changed since, make it again.",
    ROWS: "Make it again: rows of its embedding table are not those of the checkpoint.",
    TENSORS: "Make it again: tensors that no rounding changes are not those of the checkpoint.",
    FILES: "Take files that were added out of the folder; if others changed, make it again.",
    GRAPHS: "Export it again: other software gets other results from a graph of the folder.",
}
# Failures that belong to the reference.
OF_REFERENCE = {"reference results with NaN", "retrieval: reference's NaN", "MTEB: reference's NaN"}
# A graph's precision to the next better one.
BETTER = {
    "int4": "int8-weight",
    "mixed": "int8-weight",
    "int8": "int8-weight",
    "fp8": "bf16",
    "int8-weight": "fp32",
    "bf16": "fp32",
    "fp16": "fp32",
}
# Inputs of the smallest group of 4 bits that an export makes by an option.
SMALL_GROUP = 32
# Algorithms that round each matrix by itself.
UNCALIBRATED = ("rtn", "mse")


def next_steps(
    gates: Sequence[Gate],
    info: ModelInfo,
    origin: Origin,
    layers: Sequence[LayerError] | None,
) -> tuple[str, ...]:
    """List the next steps if a gate fails, the most telling first; empty if none fails.

    Args:
        gates: The gates.
        info: The artifact, or the checkpoint.
        origin: The reference.
        layers: The error after each layer; None if it was not measured.
    """
    failed = {gate.name for gate in gates if gate.failed}
    return tuple(_steps(failed, info, origin, layers)) if failed else ()


def other_weights(info: ModelInfo, origin: Origin) -> str:
    """How the reference's weight files differ from those the artifact was made of; "" if not.

    Those of a quantized checkpoint's original are not known.
    """
    if info.artifact is None or info.artifact.manifest.source.original is not None:
        return ""
    made_from = info.artifact.manifest.source
    for name, sha256 in made_from.files.items():
        here = origin.files.get(name)
        if here != sha256:
            return (
                f"the artifact was made from {made_from.pinned}, whose {name} has the sha256 "
                f"{sha256[:16]}…; that of {origin.pinned} has {here[:16] + '…' if here else 'none'}"
            )
    if origin.adapter is not None and made_from.adapter is None:
        return (
            f"the artifact was made from {made_from.pinned} without an adapter, and the reference "
            f"has {origin.adapter}"
        )
    return ""


def _steps(
    failed: set[str], info: ModelInfo, origin: Origin, layers: Sequence[LayerError] | None
) -> Iterator[str]:
    if difference := other_weights(info, origin):
        yield f"Compare it with its own checkpoint: {difference}."
    if TOKENS in failed:
        yield (
            "Compare tokenizer.json and the prompts of both folders; if the checkpoint changed "
            "since, export it again."
        )
        return
    yield from (step for gate, step in OF_FOLDER.items() if gate in failed)
    failed = failed - OF_FOLDER.keys()
    if not failed:
        return
    if failed <= OF_REFERENCE:
        yield "The reference itself gives NaN: run it in fp32, on a CPU or a larger GPU."
        return
    if layers is None:
        yield "Add `--report report.html` to see in which layer the error grows."
    elif growth := largest_growth(layers):
        before, after = growth
        yield (
            f"The error grows most in layer {after.layer}: the hidden states are off by "
            f"{before.relative_error_mean:.2g} of their length before it and "
            f"{after.relative_error_mean:.2g} after it." + _keep(info, after.layer)
        )
    yield from _better(info, origin)


def _keep(info: ModelInfo, layer: int) -> str:
    recipe = info.artifact.manifest.recipe if info.artifact else None
    if info.precision == "fp8" or not recipe:
        return ""
    # The hidden state after layer 1 is that of layers.0.
    prefix = f"layers.{layer - 1}."
    count = sum(name.startswith(prefix) for name in recipe["formats"])
    if not count:
        return ""
    return (
        f" Its {count} quantized matrices, {prefix}*, stay in floating point if the recipe leaves "
        "them out (`--recipe`); `--precision auto` finds such matrices by itself."
    )


def _better(info: ModelInfo, origin: Origin) -> Iterator[str]:
    graph = info.artifact.manifest.graph if info.artifact else None
    if info.artifact is None or graph is None:
        if info.precision not in ("fp32", "fp16", "bf16"):
            yield "Take a method with more bits, or the checkpoint as it is."
        return
    recipe = info.artifact.manifest.recipe or {}
    if info.precision == "int4" and recipe.get("algorithm") in UNCALIBRATED:
        yield "Calibrate: export with `--precision int4` without `--fast`, at about the same size."
    if info.artifact.manifest.source.original is not None:
        yield (
            "The checkpoint that it was made from is quantized, and that error is in it too: give "
            "limits for it (`--min-cosine`, `--max-score-difference`), or export the original."
        )
        return
    schemes = [Format.parse(text).scheme for text in recipe.get("formats", {}).values()]
    groups = [scheme.group_size or 0 for scheme in schemes if scheme.bits == 4]
    if info.precision == "int4" and max(groups, default=0) > SMALL_GROUP:
        yield f"Smaller groups: export with `--precision int4 --group-size {SMALL_GROUP}`."
    better = BETTER.get(info.precision)
    if better is None:
        yield "fp32 has no better precision: look for another pooling, prompt or checkpoint."
        return
    sizes = ""
    if better in origin.sizes:
        files = info.artifact.manifest.files
        taken = sum(record.size for name, record in files.items() if name.startswith(graph.path))
        sizes = (
            f", about {size_words(origin.sizes[better])} of weights; this artifact has "
            f"{size_words(taken)}"
        )
    yield f"Next better precision: export with `--precision {better}`{sizes}."
