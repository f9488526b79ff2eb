"""An artifact's vectors or scores here, compared with those it gave where it was exported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import ArtifactError, InputError, require
from ..manifest import Manifest
from ..spec import Task
from ..witness import WITNESS, Machine, describe_machine, read_witness
from .compiled import register_kernels
from .embedder import Embedder
from .reranker import Reranker


@dataclass(frozen=True)
class Limits:
    """How far results of one artifact may be apart.

    Attributes:
        min_cosine: Between two vectors of one text.
        max_difference: Between two scores of one pair.
    """

    min_cosine: float
    max_difference: float


# By a matrix's format, between two CPUs; docs/runtimes.md has what was measured. In fp32 sums in
# another order are all that differs. The kernels give the same bits on every instruction set.
ON_CPUS = {
    "fp32": Limits(0.9999999, 1e-5),
    "int8": Limits(0.99999, 1e-3),
    "int8-weight": Limits(0.99999, 1e-3),
    "int4": Limits(0.9999, 1e-3),
    "fp16": Limits(0.99999, 1e-2),
    "bf16": Limits(0.9999, 1e-2),
    "fp8": Limits(0.999, 2e-2),
}
# Instead, where different code runs: kernels on one side only, or onnxruntime's operators on both
# and another CPU or version. A value half-way between two 8-bit codes then goes either way, and
# products of weights in groups round activations as each CPU's code likes.
UNLIKE = {
    "int8": Limits(0.9999, 2e-2),
    "int8-weight": Limits(0.9999, 2e-2),
    "int4": Limits(0.9998, 2e-2),
}
# Against a GPU, or between GPUs: those of `validate` for the same arithmetic. Not measured yet.
ON_GPUS = {
    "fp32": Limits(0.99999, 1e-4),
    "int8": Limits(0.999, 2e-2),
    "int8-weight": Limits(0.999, 2e-2),
    "int4": Limits(0.999, 2e-2),
    "fp16": Limits(0.9995, 1e-2),
    "bf16": Limits(0.9995, 1e-2),
    "fp8": Limits(0.99, 5e-2),
}
TABLE = "embed_tokens"


@dataclass(frozen=True)
class Check:
    """A comparison of an artifact with its witness.

    Attributes:
        artifact: Its folder or hub id.
        task: "embedding" or "reranker".
        precision: What is stored and what is computed in, in words.
        device: What it ran on.
        passed: Whether all rows are within the limit.
        rows: Texts or pairs that were compared.
        min_cosine: The smallest cosine of a text's two vectors; None for a reranker.
        max_difference: The largest difference of two values of a vector, or of two scores.
        worst: The row that is farthest off.
        limit: Of the cosine, or of a score's difference.
        exported: Where the artifact was exported.
        here: This machine.
        reasons: What differs between the two that may change results, in words.
    """

    artifact: str
    task: Task
    precision: str
    device: str
    passed: bool
    rows: int
    min_cosine: float | None
    max_difference: float
    worst: int
    limit: float
    exported: Machine
    here: Machine
    reasons: list[str]

    def __str__(self) -> str:
        return f"{self.verdict}: {self.figures}"

    @property
    def noun(self) -> str:
        """The word for its results."""
        return "scores" if self.task == "reranker" else "vectors"

    @property
    def verdict(self) -> str:
        """The result in a line, without figures."""
        cpu, version = self.exported.cpu, self.exported.onnxruntime
        same = "the same" if self.passed else "not the same"
        return f"{same} {self.noun} as on {cpu} (onnxruntime {version})"

    @property
    def figures(self) -> str:
        """The figures in a line."""
        if self.min_cosine is None:
            return (
                f"{self.rows} pairs, largest difference {self.max_difference:.2e} in pair "
                f"{self.worst} (limit {self.limit:g})"
            )
        return (
            f"{self.rows} texts, minimum cosine {self.min_cosine:.9f} in text {self.worst} "
            f"(limit {self.limit:g}), largest difference of a value {self.max_difference:.2e}"
        )

    def to_record(self) -> dict[str, object]:
        """A value that JSON can hold."""
        return asdict(self)


def compare_witness(loaded: Embedder | Reranker) -> Check:
    """Run an artifact's witness and compare.

    Args:
        loaded: The artifact, loaded.

    Returns:
        The comparison, passed or not.

    Raises:
        ArtifactError: The artifact has no witness, or a damaged one.
        InputError: It is a checkpoint, which has none; or an engine takes none of its rows.
    """
    facts = loaded.facts
    artifact = facts.artifact
    if artifact is None or artifact.manifest.graph is None:
        raise InputError(
            f"{facts.folder} is a checkpoint, and only an artifact of `embedport export` keeps "
            "vectors to compare with; `embedport validate` compares a checkpoint"
        )
    manifest = artifact.manifest
    path = artifact.folder / WITNESS
    if WITNESS not in manifest.files:
        raise ArtifactError(
            f"{artifact.folder} has no {WITNESS}: the embedport that exported it kept nothing to "
            "compare with; export it again with `embedport export`"
        )
    witness = read_witness(path)
    here = describe_machine(kernels=find_kernels(manifest, loaded.device))
    # An engine takes rows up to its largest profile.
    chosen = [i for i, row in enumerate(witness.rows) if len(row) <= facts.max_length]
    if not chosen:
        raise InputError(
            f"{path}: no row has {facts.max_length} tokens or fewer, all that this engine takes"
        )
    rows, expected = [witness.rows[i] for i in chosen], witness.results[chosen]
    if isinstance(loaded, Reranker):
        if witness.queries is None:
            raise ArtifactError(f"{path} is an embedder's, and the artifact is a reranker")
        found = loaded.score_rows(rows, [witness.queries[i] for i in chosen])
    else:
        found = loaded.embed_rows(rows)
    if found.shape != expected.shape:
        raise ArtifactError(
            f"{path} holds results of shape {expected.shape}, and the artifact gives {found.shape}"
        )
    limits = find_limits(manifest, loaded.device, witness.machine, here)
    differences = np.abs(found.astype(np.float64) - expected)
    if isinstance(loaded, Reranker):
        worst, cosine, limit = _largest(differences), None, limits.max_difference
        passed = bool(differences.max() <= limit)
    else:
        cosines = row_cosines(found, expected)
        worst, limit = _largest(-cosines), limits.min_cosine
        cosine = float(cosines[worst])
        passed = bool(cosine >= limit)
    return Check(
        artifact=facts.name,
        task=facts.task,
        precision=loaded.precision,
        device=loaded.device,
        passed=passed,
        rows=len(rows),
        min_cosine=cosine,
        max_difference=float(differences.max()),
        worst=chosen[worst],
        limit=limit,
        exported=witness.machine,
        here=here,
        reasons=_reasons(manifest, loaded.device, witness.machine, here),
    )


def _largest(values: np.ndarray) -> int:
    """The number of the largest value; of NaN, if there is one."""
    return int(np.argmax(np.where(np.isnan(values), np.inf, values)))


def row_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the rows of two arrays, float64 [n], computed in float64.

    In float32 a cosine's own rounding, 6e-8, is most of the difference that fp32 is held to.

    Args:
        a: float32 [n, dim].
        b: The same.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def find_kernels(manifest: Manifest, device: str) -> str | None:
    """The instruction set of the package's kernels that run in an artifact's graph here, or None.

    Args:
        manifest: The artifact's manifest.
        device: What it runs on.
    """
    graph = manifest.graph
    assert graph is not None
    if device != "cpu" or graph.dialect != "ort" or graph.arithmetic != "fp32":
        return None
    return register_kernels(require("onnxruntime", "cpu").SessionOptions())


def find_limits(manifest: Manifest, device: str, exported: Machine, here: Machine) -> Limits:
    """How far an artifact's results may be from its witness: the loosest of what is in its graph.

    Args:
        manifest: The artifact's manifest.
        device: What it runs on.
        exported: Where it was exported.
        here: Where it runs.
    """
    table = dict(ON_CPUS) if device == "cpu" else ON_GPUS
    if device == "cpu" and not _computes_alike(exported, here):
        table |= UNLIKE
    limits = [table[each] for each in _kinds(manifest)]
    return Limits(
        min(each.min_cosine for each in limits), max(each.max_difference for each in limits)
    )


def _kinds(manifest: Manifest) -> set[str]:
    """The precisions of a graph's matrices, and its arithmetic."""
    graph = manifest.graph
    assert graph is not None
    # A table is looked up: nothing is multiplied.
    formats: Iterable[str] = () if manifest.recipe is None else manifest.recipe["formats"].items()
    grouped = {"int8/": "int8-weight", "int4/": "int4"}
    return {graph.arithmetic} | {
        grouped.get(text[:5], text) for name, text in formats if name != TABLE
    }


def _computes_alike(exported: Machine, here: Machine) -> bool:
    """Whether the same code computes what rounds to 8 bits."""
    if exported.kernels or here.kernels:
        return bool(exported.kernels and here.kernels)
    return (exported.instructions, exported.onnxruntime) == (here.instructions, here.onnxruntime)


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
        reasons.append(
            f"embedport's kernels ran only {where}: onnxruntime's operators round differently"
        )
    if exported.onnxruntime != here.onnxruntime:
        reasons.append(
            f"another onnxruntime: {exported.onnxruntime} there, {here.onnxruntime} here"
        )
    if exported.embedport != here.embedport:
        reasons.append(f"another embedport: {exported.embedport} there, {here.embedport} here")
    if device == "cpu" and kinds & UNLIKE.keys() and not _computes_alike(exported, here):
        reasons.append(
            "so other code rounds to 8 bits here: held to a wider limit than with the kernels on "
            "both sides"
        )
    if "int8" in kinds and _may_saturate(exported) != _may_saturate(here):
        where = "here" if _may_saturate(here) else "where it was exported"
        reasons.append(
            f"int8 codes that an older embedport wrote saturate on a CPU without VNNI, as {where}: "
            "export it again"
        )
    return reasons


def _may_saturate(machine: Machine) -> bool:
    """Whether the CPU adds two products of 8 bits in 16: x86 without VNNI."""
    sets = set(machine.instructions)
    return "sse4_2" in sets and not sets & {"avx_vnni", "avx512_vnni", "amx_int8"}
