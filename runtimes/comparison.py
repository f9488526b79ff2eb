"""Compare an artifact's vectors or scores on this machine with those of its export."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..artifact.manifest import Manifest
from ..artifact.witness import WITNESS, Machine, describe_machine, read_witness
from ..checkpoint.spec import Task
from ..errors import ArtifactError, InputError, require
from .embedder import Embedder
from .info import ModelInfo
from .ort_custom_ops import choose_kernels, register_kernels
from .reranker import Reranker
from .vectors import cosines


@dataclass(frozen=True)
class Limits:
    """Limits on the difference between two machines' results of one artifact.

    Attributes:
        min_cosine: The smallest allowed cosine of a text's two vectors.
        max_difference: The largest allowed difference of a pair's two scores.
    """

    min_cosine: float
    max_difference: float


# Between two CPUs, by the format of the matrices; docs/runtimes.md has the measurements. In fp32
# only the order of sums differs. The kernels give the same bits on every instruction set.
ON_CPUS = {
    "fp32": Limits(0.9999999, 1e-5),
    "int8": Limits(0.99999, 1e-3),
    "int8-weight": Limits(0.99999, 1e-3),
    "int4": Limits(0.9999, 1e-3),
    "fp16": Limits(0.99999, 1e-2),
    "bf16": Limits(0.9999, 1e-2),
    "fp8": Limits(0.999, 2e-2),
}
# These apply instead if different code runs: kernels on one side only, or onnxruntime's operators
# on both with another CPU or version. A value half-way between two 8-bit codes may then round
# either way, and products with grouped weights round activations differently on each CPU.
UNLIKE = {
    "int8": Limits(0.9999, 2e-2),
    "int8-weight": Limits(0.9999, 2e-2),
    "int4": Limits(0.9998, 2e-2),
}
WIDER = (
    "so other code rounds to 8 bits here: a wider limit applies than with the kernels on both sides"
)
# Against a GPU, or between GPUs: `validate`'s limits for the same arithmetic. Not measured yet.
ON_GPUS = {
    "fp32": Limits(0.99999, 1e-4),
    "int8": Limits(0.999, 2e-2),
    "int8-weight": Limits(0.999, 2e-2),
    "int4": Limits(0.999, 2e-2),
    "fp16": Limits(0.9995, 1e-2),
    "bf16": Limits(0.9995, 1e-2),
    "fp8": Limits(0.99, 5e-2),
}
# Against other software with the same weights, on any device. Activations in 8 bits turn last bits
# into whole steps, in each layer again: docs/validation.md has the measurements.
OTHER_SOFTWARE = {
    "fp32": Limits(0.99999, 1e-4),
    "fp16": Limits(0.999, 2e-2),
    "bf16": Limits(0.999, 2e-2),
    "int8": Limits(0.99, 5e-2),
    "int8-weight": Limits(0.99, 5e-2),
    "int4": Limits(0.99, 5e-2),
    "fp8": Limits(0.98, 5e-2),
}
TABLE = "embed_tokens"


@dataclass(frozen=True)
class Check:
    """The result of comparing an artifact with its witness.

    Attributes:
        artifact: Its folder or hub id.
        task: "embedding" or "reranker".
        precision: The storage format and the arithmetic, in words.
        device: The device it ran on.
        passed: Whether all rows are within the limit.
        rows: Number of texts or pairs compared.
        min_cosine: The smallest cosine of a text's two vectors; None for a reranker.
        max_difference: The largest difference between two values of a vector, or two scores.
        max_stretch: The largest relative difference of a vector's length; None for a reranker.
        worst: The row with the largest deviation.
        limit: The limit on the cosine, or on a score's difference.
        exported: The machine of the export.
        here: This machine.
        reasons: Differences between the machines that may change results, in words.
    """

    artifact: str
    task: Task
    precision: str
    device: str
    passed: bool
    rows: int
    min_cosine: float | None
    max_difference: float
    max_stretch: float | None
    worst: int
    limit: float
    exported: Machine
    here: Machine
    reasons: list[str]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.figures}"

    @property
    def noun(self) -> str:
        """The plural of its results: "scores" or "vectors"."""
        return "scores" if self.task == "reranker" else "vectors"

    @property
    def verdict(self) -> str:
        """The verdict in one line, without figures."""
        cpu, version = self.exported.cpu, self.exported.onnxruntime
        same = "the same" if self.passed else "not the same"
        return f"{same} {self.noun} as on {cpu} (onnxruntime {version})"

    @property
    def figures(self) -> str:
        """The figures in one line."""
        if self.min_cosine is None:
            return (
                f"{self.rows} pairs, largest difference {self.max_difference:.2e} in pair "
                f"{self.worst} (limit {self.limit:.9g})"
            )
        return (
            f"{self.rows} texts, minimum cosine {self.min_cosine:.9f} in text {self.worst} "
            f"(limit {self.limit:.9g}), largest difference of a value {self.max_difference:.2e}, "
            f"of a vector's length {self.max_stretch:.1e} (limit {most_stretch(self.limit):.1e})"
        )

    def to_record(self) -> dict[str, object]:
        """A JSON-serializable dict."""
        return asdict(self)


def compare_witness(loaded: Embedder | Reranker) -> Check:
    """Run the token ids of an artifact's witness, and compare the results with the witness.

    Args:
        loaded: The loaded artifact.

    Returns:
        The comparison, passed or not.

    Raises:
        ArtifactError: The artifact has no witness, or a damaged one.
        InputError: It is a checkpoint, which has no witness; or all rows are too long for its
            engine.
    """
    info = loaded.info
    manifest, path = _find_witness(info)
    witness = read_witness(path)
    ids = np.concatenate(witness.rows)
    if ids.min() < 0 or ids.max() >= info.vocab_size:
        raise ArtifactError(
            f"{path}: token ids should be from 0 to {info.vocab_size - 1}, found {ids.min()} to "
            f"{ids.max()}: it is not this model's; export the artifact again"
        )
    here = describe_machine(kernels=find_kernels(manifest, loaded.device))
    # An engine takes rows up to its largest profile.
    chosen = [i for i, row in enumerate(witness.rows) if len(row) <= info.max_length]
    if not chosen:
        raise InputError(
            f"{path}: no row has {info.max_length} tokens or fewer, all that this engine takes"
        )
    rows, expected = [witness.rows[i] for i in chosen], witness.results[chosen]
    if isinstance(loaded, Reranker):
        if witness.queries is None:
            raise ArtifactError(f"{path} is an embedder's, and the artifact is a reranker")
        results = loaded.score_rows(rows, [witness.queries[i] for i in chosen])
    else:
        results = loaded.embed_rows(rows)
    if results.shape != expected.shape:
        raise ArtifactError(
            f"{path} holds results of shape {expected.shape}, and the artifact gives "
            f"{results.shape}"
        )
    limits = find_limits(manifest, loaded.device, witness.machine, here)
    differences = np.abs(results.astype(np.float64) - expected)
    if isinstance(loaded, Reranker):
        # argmax and argmin return the first NaN, if there is one.
        worst, cosine, limit = int(differences.argmax()), None, limits.max_difference
        stretch, passed = None, bool(differences.max() <= limit)
    else:
        row_cosines = cosines(results, expected)
        worst, limit = int(row_cosines.argmin()), limits.min_cosine
        cosine, stretch = float(row_cosines[worst]), _max_stretch(results, expected)
        passed = cosine >= limit and stretch <= most_stretch(limit)
    return Check(
        artifact=info.name,
        task=info.task,
        precision=loaded.precision,
        device=loaded.device,
        passed=passed,
        rows=len(rows),
        min_cosine=cosine,
        max_difference=float(differences.max()),
        max_stretch=stretch,
        worst=chosen[worst],
        limit=limit,
        exported=witness.machine,
        here=here,
        reasons=_reasons(manifest, loaded.device, witness.machine, here),
    )


def most_stretch(min_cosine: float) -> float:
    """The limit on the relative difference of two lengths: as far as the cosine lets ends move."""
    return math.sqrt(2 * (1 - min_cosine))


def _max_stretch(results: np.ndarray, expected: np.ndarray) -> float:
    """The largest relative difference of a row's length, which its cosine does not show."""
    lengths, theirs = (
        np.linalg.norm(rows.astype(np.float64), axis=1) for rows in (results, expected)
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.abs(lengths / theirs - 1).max())


def _find_witness(info: ModelInfo) -> tuple[Manifest, Path]:
    """The manifest and the witness's path of an artifact; refuses a model without a witness."""
    artifact = info.artifact
    if artifact is None or artifact.manifest.graph is None:
        raise InputError(
            f"{info.folder} is a checkpoint, and only an artifact of `embedport export` keeps "
            "vectors to compare with; `embedport validate` compares a checkpoint"
        )
    if WITNESS not in artifact.manifest.files:
        raise ArtifactError(
            f"{artifact.folder} has no {WITNESS}: the embedport that exported it kept nothing to "
            "compare with; export it again with `embedport export`"
        )
    return artifact.manifest, artifact.folder / WITNESS


def find_kernels(manifest: Manifest, device: str) -> str | None:
    """The instruction set of the kernels that run an artifact's graph here; None without kernels.

    Args:
        manifest: The artifact's manifest.
        device: The device it runs on.
    """
    graph = manifest.graph
    assert graph is not None
    if device != "cpu" or not graph.has_functions:
        return None
    return register_kernels(require("onnxruntime", "cpu").SessionOptions())


def find_limits(manifest: Manifest, device: str, exported: Machine, here: Machine) -> Limits:
    """The limits for an artifact: the loosest of the formats in its graph.

    Args:
        manifest: The artifact's manifest.
        device: The device it runs on.
        exported: The machine of the export.
        here: The machine it runs on.
    """
    table = dict(ON_CPUS) if device == "cpu" else ON_GPUS
    if device == "cpu" and not _computes_alike(exported, here):
        table |= UNLIKE
    return _loosest(manifest, table)


def other_software_limits(manifest: Manifest) -> Limits:
    """The limits between an artifact's results here and those of other software with its weights.

    Args:
        manifest: The artifact's manifest.
    """
    return _loosest(manifest, OTHER_SOFTWARE)


def _loosest(manifest: Manifest, table: Mapping[str, Limits]) -> Limits:
    limits = [table[kind] for kind in _kinds(manifest)]
    return Limits(
        min(limit.min_cosine for limit in limits), max(limit.max_difference for limit in limits)
    )


def _kinds(manifest: Manifest) -> set[str]:
    """The precisions of a graph's matrices, and its arithmetic."""
    graph = manifest.graph
    assert graph is not None
    # The embedding table does not count: it is looked up, not multiplied.
    formats: Iterable[str] = () if manifest.recipe is None else manifest.recipe["formats"].items()
    grouped = {"int8/": "int8-weight", "int4/": "int4"}
    return {graph.arithmetic} | {
        grouped.get(text[:5], text) for name, text in formats if name != TABLE
    }


def _computes_alike(exported: Machine, here: Machine) -> bool:
    """Whether both machines run the same code where values are rounded to 8 bits."""
    if exported.kernels or here.kernels:
        return bool(exported.kernels and here.kernels)
    # Where the instruction sets are not known, as on Windows, by the CPU's name.
    there, own = exported.instructions or exported.cpu, here.instructions or here.cpu
    return (there, exported.onnxruntime) == (own, here.onnxruntime)


def _reasons(manifest: Manifest, device: str, exported: Machine, here: Machine) -> list[str]:
    """Differences between two machines that may change results."""
    kinds, reasons = _kinds(manifest), []
    if device != "cpu":
        reasons.append(f"the witness was computed on a CPU, and this ran on {device}")
        if kinds & {"fp16", "bf16", "fp8"}:
            reasons.append(
                "the CPU emulated 16 bits: fp32 arithmetic, each result rounded; a GPU sums in "
                "another order and keeps some results unrounded"
            )
    if (exported.cpu, exported.instructions) != (here.cpu, here.instructions):
        reasons.append("another kind of CPU: sums are taken in another order")
    if bool(exported.kernels) != bool(here.kernels) and device == "cpu":
        where = "here" if here.kernels else "where it was exported"
        without = choose_kernels()[1]
        reasons.append(
            f"embedport's kernels ran only {where}{without and f' ({without})'}: onnxruntime's "
            "operators round differently"
        )
    if exported.onnxruntime != here.onnxruntime:
        reasons.append(
            f"another onnxruntime: {exported.onnxruntime} there, {here.onnxruntime} here"
        )
    if exported.embedport != here.embedport:
        reasons.append(f"another embedport: {exported.embedport} there, {here.embedport} here")
    if device == "cpu" and kinds & UNLIKE.keys() and not _computes_alike(exported, here):
        reasons.append(WIDER)
    if "int8" in kinds and _may_saturate(exported) != _may_saturate(here):
        where = "here" if _may_saturate(here) else "where it was exported"
        reasons.append(
            f"int8 codes that an older embedport wrote saturate on a CPU without VNNI, as {where}: "
            "export it again"
        )
    return reasons


def _may_saturate(machine: Machine) -> bool:
    """Whether the CPU adds two 8-bit products in 16 bits, which may saturate: x86 without VNNI."""
    names = set(machine.instructions)
    return "sse4_2" in names and not names & {"avx_vnni", "avx512_vnni", "amx_int8"}
