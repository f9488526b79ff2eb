"""An artifact against the reference: the same texts through both, and the distance between."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from ..artifact import record_parity
from ..demo.samples import Pair, Sample, builtin_pairs, builtin_samples
from ..errors import InputError
from ..hub import fetch
from ..prompts import DEFAULT_INSTRUCTION
from ..runtimes import Embedder, Reranker, load
from ..runtimes.embedder import shorten
from ..spec import ModelSpec, read_spec
from .invariance import check_invariance
from .measures import cosines, kendall_tau, nonfinite_rows, top_k_overlap
from .reference import Reference, choose_device
from .report import Comparison, Gate, Report
from .thresholds import Thresholds, find_thresholds

TOP_K = 10
WORST = 5
DIMENSIONS = (2048, 1024, 512, 256, 128, 64, 32)
# On a GPU the fp16 reference is the standard, bf16 beside it: an fp16 Qwen3-8B itself gives NaN.
REFERENCES = {"cuda": ("fp16", "bf16"), "cpu": ("fp32 arithmetic on fp16 weights",)}
PACKAGES = ("embedport", "onnxruntime", "onnxruntime-gpu", "torch", "transformers")


def validate(
    artifact: str | Path,
    reference: str | Path,
    texts: Sequence[Sample | str] | None = None,
    pairs: Sequence[Pair | tuple[str, str]] | None = None,
    *,
    revision: str | None = None,
    device: str = "auto",
    min_cosine: float | None = None,
    max_score_difference: float | None = None,
    record: bool = True,
    progress: bool = False,
) -> Report:
    """Compare an artifact with its checkpoint run by transformers.

    On a GPU the reference computes in fp16, with bf16 beside it; on a CPU in fp32 on weights that
    are rounded to fp16. Token ids are compared before any number is computed.

    Args:
        artifact: The artifact's folder.
        reference: The checkpoint's folder or hub id.
        texts: For an embedding: texts, or Samples that name their prompt; the built-in ones if
            none are given.
        pairs: For a reranker: (query, document); the built-in ones if none are given.
        revision: Of the reference, for a hub id.
        device: Where the artifact runs, as in `load`; the reference runs on a GPU if there is one
            and `device` is not "cpu".
        min_cosine: Another limit than the precision's own.
        max_score_difference: The same, for a reranker.
        record: Whether the figures go into the artifact's manifest and model card.
        progress: Whether to show progress bars on a terminal.

    Returns:
        The report; `report.passed` says whether every gate holds.

    Raises:
        InputError: Texts for a reranker or pairs for an embedding, or none at all.
        MissingPackageError: torch or transformers is not installed.
        ArtifactError, CheckpointError, DeviceError: As `load` and `ModelSpec.from_checkpoint`.
    """
    runtime = load(artifact, device=device)
    manifest = runtime.artifact.manifest
    spec = read_spec(fetch(reference, revision), manifest.task)
    if spec.hidden_size != manifest.hidden_size:
        raise InputError(
            f"{reference} has hidden size {spec.hidden_size}, and {artifact} was made from a model "
            f"of {manifest.hidden_size}: not the artifact's reference"
        )
    limits = find_thresholds(manifest.precision)
    if min_cosine is not None:
        limits = replace(limits, min_cosine=min_cosine)
    if max_score_difference is not None:
        limits = replace(limits, max_score_difference=max_score_difference)
    if isinstance(runtime, Embedder):
        if pairs is not None:
            raise InputError(f"{artifact} is an embedding model: give texts, not pairs")
        samples = builtin_samples() if texts is None else list(map(_sample, texts))
        work = _embedding_work(runtime, spec, samples, progress)
    else:
        if texts is not None:
            raise InputError(f"{artifact} is a reranker: give pairs, not texts")
        judged = builtin_pairs() if pairs is None else [_pair(pair) for pair in pairs]
        work = _reranker_work(runtime, judged, progress)
    if not work.texts:
        raise InputError("there is nothing to compare: give at least one text or pair")
    report = _compare(runtime, spec, work, limits, choose_device(device), progress)
    if record:
        record_parity(runtime.artifact.folder, report.to_dict(), report.to_markdown())
    return report


@dataclass(frozen=True)
class _Work:
    """What differs between an embedding and a reranker.

    Attributes:
        texts: The texts, for people.
        rows: The artifact's token ids of each.
        reference_ids: The reference's.
        run: The artifact's results, float32 [n, dim] or [n].
        run_reference: The reference's, from its own token ids, cut to the artifact's dimension.
        agree: (found, expected) to the agreement of each text, float [n].
        figures: (found, expected) to the measures of all.
        worst_is_least: Whether a low agreement is bad (a cosine) or a high one (a difference).
    """

    texts: list[str]
    rows: list[np.ndarray]
    reference_ids: Callable[[Reference], list[list[int]]]
    run: Callable[[], np.ndarray]
    run_reference: Callable[[Reference, list[list[int]]], np.ndarray]
    agree: Callable[[np.ndarray, np.ndarray], np.ndarray]
    figures: Callable[[np.ndarray, np.ndarray], dict[str, float]]
    worst_is_least: bool


def _sample(text: Sample | str) -> Sample:
    return Sample(text) if isinstance(text, str) else text


def _pair(pair: Pair | tuple[str, str]) -> Pair:
    return pair if isinstance(pair, Pair) else Pair(*pair)


def _embedding_work(
    embedder: Embedder, spec: ModelSpec, samples: list[Sample], progress: bool
) -> _Work:
    texts = [sample.text for sample in samples]
    groups = {
        prompt: [i for i, sample in enumerate(samples) if sample.prompt == prompt]
        for prompt in dict.fromkeys(sample.prompt for sample in samples)
    }

    def rows() -> list[np.ndarray]:
        found: dict[int, np.ndarray] = {}
        for prompt, members in groups.items():
            encoded = embedder.tokenizer.encode(
                [texts[i] for i in members], embedder.prompt_text(prompt)
            )
            found |= zip(members, encoded.ids, strict=True)
        return [found[i] for i in range(len(texts))]

    def reference_ids(reference: Reference) -> list[list[int]]:
        # The prompts are the checkpoint's, not the artifact's.
        inputs = [spec.prompts.get(each.prompt, each.prompt) + each.text for each in samples]
        return reference.embedding_ids(inputs, embedder.tokenizer.max_length)

    def run() -> np.ndarray:
        vectors = np.empty((len(texts), embedder.dim), np.float32)
        for prompt, members in groups.items():
            vectors[members] = embedder.encode(
                [texts[i] for i in members], prompt=prompt, progress=progress
            )
        return vectors

    def figures(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        agreement = cosines(found, expected)
        queries = groups.get("query", [])
        documents = [i for i in range(len(texts)) if i not in set(queries)]
        if not queries or not documents:
            queries = documents = list(range(len(texts)))
        return {
            "mean cosine": float(agreement.mean()),
            "1st percentile of cosine": float(np.percentile(agreement, 1)),
            "minimum cosine": float(agreement.min()),
        } | _rank_agreement(
            found[queries] @ found[documents].T, expected[queries] @ expected[documents].T
        )

    return _Work(
        texts=texts,
        rows=rows(),
        reference_ids=reference_ids,
        run=run,
        run_reference=lambda reference, ids: shorten(
            reference.embed(ids, progress=progress), embedder.dim
        ),
        agree=cosines,
        figures=figures,
        worst_is_least=True,
    )


def _reranker_work(reranker: Reranker, pairs: list[Pair], progress: bool) -> _Work:
    both = [(pair.query, pair.document) for pair in pairs]
    queries = dict.fromkeys(pair.query for pair in pairs)
    groups = [[i for i, pair in enumerate(pairs) if pair.query == query] for query in queries]

    def figures(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
        difference = np.abs(found - expected)
        ranks = [_rank_agreement(found[None, each], expected[None, each]) for each in groups]
        return {
            "mean score difference": float(difference.mean()),
            "maximum score difference": float(difference.max()),
        } | {name: float(np.mean([rank[name] for rank in ranks])) for name in ranks[0]}

    return _Work(
        texts=[f"{pair.query} | {pair.document}" for pair in pairs],
        rows=reranker.tokenizer.encode(both).ids,
        reference_ids=lambda reference: reference.reranker_ids(
            both, DEFAULT_INSTRUCTION, reranker.tokenizer.max_length
        ),
        run=lambda: reranker.score(both, progress=progress),
        run_reference=lambda reference, ids: reference.score(ids, progress=progress),
        agree=lambda found, expected: np.abs(found - expected),
        figures=figures,
        worst_is_least=False,
    )


def _rank_agreement(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    """Means over queries; scores are [queries, documents]."""
    rankings = list(zip(found, expected, strict=True))
    return {
        "Kendall tau": float(np.mean([kendall_tau(a, b) for a, b in rankings])),
        f"top-{TOP_K} overlap": float(np.mean([top_k_overlap(a, b, TOP_K) for a, b in rankings])),
    }


def _compare(
    runtime: Embedder | Reranker,
    spec: ModelSpec,
    work: _Work,
    limits: Thresholds,
    place: str,
    progress: bool,
) -> Report:
    comparisons: list[Comparison] = []
    invariance: dict[str, float] = {}
    mismatch, found = None, np.empty(0, np.float32)
    for precision in REFERENCES[place]:
        reference = Reference(spec, precision, place)
        ids = work.reference_ids(reference)
        mismatch = _first_difference(work, ids)
        if mismatch:
            break
        if not comparisons:
            found = work.run()
            invariance = check_invariance(runtime.model, work.rows)
        expected = work.run_reference(reference, ids)
        comparisons.append(_comparison(work, found, expected, f"{precision} ({place})"))
    # An fp16 reference with NaN decides nothing: the next one does.
    comparisons.sort(key=lambda each: each.reference_nonfinite > 0)
    nonfinite = nonfinite_rows(found)
    return Report(
        artifact=str(runtime.artifact.folder),
        checkpoint=spec.source.id,
        task=spec.task,
        precision=runtime.artifact.manifest.precision,
        device=runtime.device,
        texts=work.texts,
        mismatch=mismatch,
        nonfinite=nonfinite,
        comparisons=comparisons,
        invariance=invariance,
        gates=_gates(work, limits, mismatch, nonfinite, comparisons, invariance),
        versions=_versions(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _first_difference(work: _Work, ids: list[list[int]]) -> str | None:
    for text, row, expected in zip(work.texts, work.rows, ids, strict=True):
        found = row.tolist()
        if found != expected:
            place = next(
                (i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b),
                min(len(found), len(expected)),
            )
            return (
                f"{text[:60]!r}: at token {place} the artifact has {found[place : place + 3]}, the "
                f"reference {expected[place : place + 3]} ({len(found)} and {len(expected)} tokens)"
            )
    return None


def _comparison(work: _Work, found: np.ndarray, expected: np.ndarray, reference: str) -> Comparison:
    agreement = work.agree(found, expected)
    # NaN sorts last either way, and is the worst of all.
    badness = np.nan_to_num(-agreement if work.worst_is_least else agreement, nan=np.inf)
    worst = np.argsort(-badness, kind="stable")[:WORST]
    dimensions = {}
    if found.ndim == 2:
        for dim in (each for each in DIMENSIONS if each < found.shape[1]):
            at_dim = cosines(found[:, :dim], expected[:, :dim])
            dimensions[dim] = (float(at_dim.mean()), float(at_dim.min()))
    return Comparison(
        reference=reference,
        reference_nonfinite=nonfinite_rows(expected),
        figures=work.figures(found, expected),
        dimensions=dimensions,
        worst=[(int(i), float(agreement[i])) for i in worst],
    )


def _gates(
    work: _Work,
    limits: Thresholds,
    mismatch: str | None,
    nonfinite: int,
    comparisons: list[Comparison],
    invariance: dict[str, float],
) -> list[Gate]:
    gates = [Gate("texts with other token ids", float(mismatch is not None), 0, False)]
    if mismatch:
        return gates
    figures, arranged = comparisons[0].figures, np.array(list(invariance.values()))
    gates.append(Gate("results with NaN or infinity", nonfinite, 0, False))
    if work.worst_is_least:
        gates += [
            Gate("minimum cosine", figures["minimum cosine"], limits.min_cosine, True),
            Gate("batch invariance", float(arranged.min()), limits.min_invariance, True),
        ]
    else:
        largest = figures["maximum score difference"]
        gates += [
            Gate("maximum score difference", largest, limits.max_score_difference, False),
            Gate(
                "batch invariance",
                float(arranged.max()),
                limits.max_invariance_difference,
                False,
            ),
        ]
    return gates


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
