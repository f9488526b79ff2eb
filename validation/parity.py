"""validate(): token ids first, then numbers, invariance, and a verdict."""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact import record_parity
from ..beir import RetrievalSet, read_beir, write_candidates
from ..demo.samples import Pair, Sample
from ..errors import InputError, require
from ..files import written
from ..ranking import candidate_pairs, rank_documents
from ..runtimes import ModelFacts, load
from ..spec import Task
from ..stored import LibraryQuantization
from .details import collect_details
from .invariance import run_suite
from .layers import layer_errors
from .measures import finite_rows
from .page import render
from .recorded import is_recorded, open_recorded
from .recording import find_recorded
from .reference import Arithmetic, Inputs, Origin, Reference
from .report import Comparison, Gate, Report, Worst, excerpt
from .retrieval import CANDIDATES, SetQuality, compare_quality
from .tasks import EmbeddingTask, RerankerTask, choose_inputs
from .thresholds import Thresholds, find_thresholds

logger = logging.getLogger(__name__)

WORST = 5
PACKAGES = (
    "embedport",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch",
    "transformers",
    "bitsandbytes",
    "compressed-tensors",
)


def validate(
    artifact: str | Path,
    reference: str | Path,
    texts: Sequence[str | Sample] | None = None,
    pairs: Sequence[tuple[str, str] | Pair] | None = None,
    *,
    revision: str | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    min_cosine: float | None = None,
    max_score_difference: float | None = None,
    retrieval: str | Path | RetrievalSet | None = None,
    max_ndcg_loss: float | None = None,
    save_run: str | Path | None = None,
    page: str | Path | None = None,
    command: Sequence[str] = (),
    record: bool = True,
    progress: bool = False,
    task: Task | None = None,
) -> Report:
    """Measure how far an artifact, or a checkpoint, is from the one it was made from.

    The checkpoint is run by its own library: sentence-transformers where its folder declares a
    pipeline for it, else transformers by the model cards' code. On a GPU it runs in fp16, with fp32
    or bf16 beside it; on a CPU in fp32 on the weights rounded to fp16, unless the checkpoint stores
    fp32. The gates are about the fp16 run, or, for an fp32 artifact, which fp16 is too coarse for,
    the fp32 one; a run with NaN or infinity gives way to one without. Token ids are compared first,
    and nothing else is done when they differ.

    Args:
        artifact: The artifact's folder, or a checkpoint as for `embedport.load`.
        reference: The checkpoint it was made from: a folder or a hub id. Or a file that
            `record_reference` wrote, which brings its texts or pairs with it; then neither torch
            nor the checkpoint is needed.
        texts: For an embedding artifact; a plain string is a document. Built-in ones by default.
        pairs: For a reranker, (query, document) each. Built-in ones by default.
        revision: A branch, tag or commit of the reference on the hub.
        adapter: The folder or hub id of a LoRA adapter to merge into the reference's weights.
        device: Where the artifact runs, as for `embedport.load`; the reference runs on the GPU that
            torch has, unless this is "cpu".
        min_cosine: Instead of the precision's limit.
        max_score_difference: Instead of the precision's limit.
        retrieval: A set on which retrieval is measured too: a folder in the BEIR layout, "builtin",
            or one that was read.
        max_ndcg_loss: Instead of the precision's limit.
        save_run: Where an embedding artifact's best 50 documents of each query are written, as a
            reranker's candidates.
        page: Where everything is written as one HTML page, charts included; needs the extra
            "report".
        command: The command line, for the page.
        record: Whether to put the figures into the artifact's manifest and model card, whatever the
            verdict. No text is put there. A checkpoint without a manifest stays as it is, and so
            does what is in the hub's cache.
        progress: Whether to show progress bars on a terminal.
        task: "embedding" or "reranker", for a checkpoint whose files do not tell.

    Raises:
        InputError: The inputs are wrong, or a limit is of what is not measured, or the reference
            is another kind of model, or a file that is damaged or of another checkpoint.
        ArtifactError: It is not an artifact, or cannot be written to.
        CheckpointError: The reference is not a whole Qwen3 checkpoint.
        DeviceError: The device asked for is not there.
        MissingPackageError: torch, transformers or sentence-transformers is not installed.
    """
    if page is not None:  # before hours of work, not after
        require("jinja2", "report")
        require("matplotlib", "report")
    if retrieval is not None:
        require("ir_measures", "retrieval")
    recorded = find_recorded(artifact) if record else None
    # An Embedder or a Reranker, as the task is.
    runtime: Any = load(artifact, device=device, task=task)
    runtime_device = runtime.device
    facts: ModelFacts = runtime.facts
    quantization = facts.checkpoint and facts.checkpoint.quantization
    if page is not None and isinstance(quantization, LibraryQuantization):
        from ..runtimes.checkpoint import require_library

        require_library(quantization)  # its table by layer is of transformers' layers
    graph = facts.artifact.manifest.graph if facts.artifact else None
    thresholds = find_thresholds(
        facts.precision,
        arithmetic=graph.arithmetic if graph else "fp32",
        min_cosine=min_cosine,
        max_score_difference=max_score_difference,
        max_ndcg_loss=max_ndcg_loss,
    )
    data = _choose_set(retrieval, task=facts.task, save_run=save_run)
    recorded_reference = None
    if is_recorded(reference):
        if adapter is not None:
            raise InputError(f"{reference} is a recorded reference: record it with --adapter")
        recorded_reference = open_recorded(reference, facts.task, runtime.tokenizer.max_length)
        texts, pairs = recorded_reference.choose_inputs(texts, pairs, revision)
        if data is not None:
            recorded_reference.check_set(data)
    inputs = choose_inputs(facts.task, texts, pairs, facts.prompts)
    _check_limits(inputs, data, min_cosine, max_score_difference, max_ndcg_loss)
    source: Reference = (
        _open_live(reference, facts.task, adapter, runtime.tokenizer.max_length, revision, device)
        if recorded_reference is None
        else recorded_reference
    )
    origin = source.origin
    if isinstance(inputs, RerankerTask):
        inputs = replace(inputs, log_odds=origin.log_odds)
    _check_same_model(facts, origin)
    _compare_weights(facts, origin)
    rows = inputs.artifact_ids(runtime)
    expected_rows = source.token_ids(inputs.inputs)
    gates = [_token_gate(inputs, rows, expected_rows)]
    comparisons: list[Comparison] = []
    invariance: dict[str, float] = {}
    worst: list[Worst] = []
    quality = None
    found = expected = None
    if gates[0].passed:
        raw = inputs.run(runtime, progress=progress)
        found = inputs.comparable(raw)
        # Vectors of queries and documents, or scores of pairs, as the task is.
        found_set: Any = None if data is None else inputs.run_set(runtime, data, progress=progress)
        for outcome in run_suite(
            runtime.model, rows, runtime.tokenizer.max_length, progress=progress
        ):
            values = inputs.agreement(*map(inputs.comparable, (outcome.found, outcome.alone)))
            invariance[outcome.case] = float(values.min() if inputs.sense == "≥" else values.max())
        del runtime  # two copies of a large model may not fit
        runs = _run_reference(source, inputs.inputs, facts.precision, progress)
        comparisons = [
            inputs.compare(found, outputs, origin.describe(arithmetic))
            for arithmetic, outputs in runs.items()
        ]
        expected = runs[next(iter(runs))]
        worst = _find_worst(inputs, found, expected)
        gates += [
            _finite_gate(inputs, raw),
            Gate("reference results with NaN", comparisons[0].reference_nonfinite, "≤", 0),
            *inputs.gates(comparisons[0], found, expected, thresholds),
            _invariance_gate(inputs, invariance, thresholds),
        ]
        if data is not None:
            measured = inputs.measure(found_set, data)
            wanted, used = _measure_reference(
                source, data, tuple(measured.measures), runs, progress
            )
            quality = compare_quality(measured, wanted, data, origin.describe(used))
            gates += [
                Gate("retrieval: NaN or infinity", measured.nonfinite, "≤", 0),
                Gate("retrieval: reference's NaN", wanted.nonfinite, "≤", 0),
                Gate("nDCG@10 loss", quality.ndcg_loss, "≤", thresholds.max_ndcg_loss),
            ]
            if save_run is not None:
                write_candidates(
                    Path(save_run), rank_documents(found_set, found.shape[1], data, CANDIDATES)
                )
    report = Report(
        artifact=str(artifact),
        precision=facts.precision,
        device=runtime_device,
        reference=origin.pinned,
        library=origin.runner,
        task=facts.task,
        inputs=len(rows),
        tokens=sum(map(len, rows)),
        gates=tuple(gates),
        comparisons=tuple(comparisons),
        invariance=invariance,
        worst=tuple(worst),
        retrieval=quality,
        versions=_versions(origin),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    if page is not None:
        where = "cpu" if runtime_device == "cpu" else "cuda"
        layers = layer_errors(facts, source, rows, device=where) if comparisons else None
        details = collect_details(
            inputs,
            found,
            expected,
            facts=facts,
            reference=origin,
            layers=layers,
            command=command,
        )
        text = render(report, details)
        with written(Path(page)) as file:
            file.write(text.encode())
    if recorded is not None:
        record_parity(recorded, report.to_record(), report.to_markdown())
    return report


def _choose_set(
    retrieval: str | Path | RetrievalSet | None, *, task: Task, save_run: str | Path | None
) -> RetrievalSet | None:
    if save_run is not None and (retrieval is None or task == "reranker"):
        raise InputError("--save-run writes what an embedding artifact finds: give --retrieval too")
    if retrieval is None or isinstance(retrieval, RetrievalSet):
        data = retrieval
    else:
        data = read_beir(retrieval)
    if data is not None and task == "reranker":
        candidate_pairs(data)  # before hours of work, not after
    return data


def _check_limits(
    task: EmbeddingTask | RerankerTask,
    data: RetrievalSet | None,
    min_cosine: float | None,
    max_score_difference: float | None,
    max_ndcg_loss: float | None,
) -> None:
    """Refuse a limit that no gate would hold."""
    if min_cosine is not None and isinstance(task, RerankerTask):
        raise InputError("a reranker gives scores, not vectors: --max-score-difference limits them")
    if max_score_difference is not None and isinstance(task, EmbeddingTask):
        kinds = set(task.is_query.tolist())
        if len(kinds) == 1:
            raise InputError(
                "--max-score-difference limits the scores of queries and documents, found "
                f"{'queries' if kinds.pop() else 'documents'} only: give texts of both kinds, each "
                "with its prompt"
            )
    if max_ndcg_loss is not None and data is None:
        raise InputError("--max-ndcg-loss limits what is lost on a set: give --retrieval too")


def _open_live(
    reference: str | Path,
    task: Task,
    adapter: str | Path | None,
    max_length: int,
    revision: str | None,
    device: str,
) -> Reference:
    from .live import open_live  # only a checkpoint needs torch

    return open_live(
        reference,
        task=task,
        adapter=adapter,
        max_length=max_length,
        revision=revision,
        device=device,
    )


def _check_same_model(facts: ModelFacts, origin: Origin) -> None:
    made = (facts.hidden_size, facts.vocab_size)
    if made != (origin.hidden_size, origin.vocab_size):
        raise InputError(
            f"the artifact was made from {facts.source}, with hidden_size and vocab_size "
            f"{made}; the reference {origin.id} has {(origin.hidden_size, origin.vocab_size)}"
        )


def _compare_weights(facts: ModelFacts, origin: Origin) -> None:
    """Say so where the reference's files are not those that the artifact was made of.

    Raises:
        InputError: They are recorded: that is no reference for this artifact.
    """
    if facts.artifact is None:
        return
    made = facts.artifact.manifest.source
    name = next((name for name in made.files if origin.files.get(name) != made.files[name]), None)
    if name is None:
        return
    if origin.recorded is not None:
        raise InputError(
            f"the artifact was made from {made.pinned}, whose {name} has the sha256 "
            f"{made.files[name]}; the recorded reference is of {origin.pinned}, whose {name} has "
            f"{origin.files.get(name, 'none')}: record the reference of the artifact's checkpoint"
        )
    logger.warning(
        "the artifact was made from %s, whose %s is not the one of %s: what follows may be the "
        "difference of two models",
        made.pinned,
        name,
        origin.id,
    )


def _token_gate(
    task: EmbeddingTask | RerankerTask,
    rows: Sequence[np.ndarray],
    expected_rows: Sequence[Sequence[int]],
) -> Gate:
    different = [
        i
        for i, (ids, expected) in enumerate(zip(rows, expected_rows, strict=True))
        if ids.tolist() != list(expected)
    ]
    detail = ""
    if different:
        i = different[0]
        detail = (
            f"{task.names[i]}, {excerpt(task.texts[i])!r}: "
            f"{_first_difference(rows[i].tolist(), expected_rows[i])}"
        )
    return Gate("inputs with other token ids", len(different), "≤", 0, detail)


def _first_difference(ids: Sequence[int], expected: Sequence[int]) -> str:
    shared = min(len(ids), len(expected))
    position = next((i for i in range(shared) if ids[i] != expected[i]), shared)
    artifact, reference = (
        str(row[position]) if position < len(row) else "nothing" for row in (ids, expected)
    )
    return f"token {position} is {artifact}, in the reference {reference}"


def _finite_gate(task: EmbeddingTask | RerankerTask, found: np.ndarray) -> Gate:
    bad = np.flatnonzero(~finite_rows(found))
    detail = ", ".join(task.names[i] for i in bad[:WORST])
    return Gate("results with NaN or infinity", len(bad), "≤", 0, detail)


def _measure_reference(
    source: Reference,
    data: RetrievalSet,
    dims: Sequence[int],
    runs: Mapping[Arithmetic, np.ndarray],
    progress: bool,
) -> tuple[SetQuality, Arithmetic]:
    """The reference on a retrieval set, and the first arithmetic that gives no NaN there.

    Where all give some, the last one.
    """
    left = list(runs)
    while True:
        used = left.pop(0)
        quality = source.measure(data, dims, used, progress=progress)
        if not left or not quality.nonfinite:
            return quality, used


def _run_reference(
    source: Reference, inputs: Inputs, precision: str, progress: bool
) -> dict[Arithmetic, np.ndarray]:
    """Arithmetic of each run to its outputs, the one that the gates are about first."""
    outputs: dict[Arithmetic, np.ndarray] = {
        arithmetic: source.run(inputs, arithmetic, progress=progress)
        for arithmetic in source.arithmetics()
    }
    preferred = "fp32" if precision == "fp32" else "fp16"
    order = sorted(
        outputs,
        key=lambda each: (int((~finite_rows(outputs[each])).sum()), each != preferred),
    )
    return {arithmetic: outputs[arithmetic] for arithmetic in order}


def _find_worst(
    task: EmbeddingTask | RerankerTask, found: np.ndarray, expected: np.ndarray
) -> list[Worst]:
    """The inputs farthest from the reference; those that are not finite come first."""
    values = task.agreement(found, expected)
    badness = np.where(np.isnan(values), np.inf, -values if task.sense == "≥" else values)
    return [
        Worst(task.names[i], float(values[i]), excerpt(task.texts[i]))
        for i in np.argsort(-badness, kind="stable")[:WORST]
    ]


def _invariance_gate(
    task: EmbeddingTask | RerankerTask, invariance: Mapping[str, float], thresholds: Thresholds
) -> Gate:
    values = np.array(list(invariance.values()))
    # argmin and argmax find NaN first.
    worst = int(np.argmin(values) if task.sense == "≥" else np.argmax(values))
    limit = task.invariance_limit(thresholds)
    return Gate(
        "batch invariance", float(values[worst]), task.sense, limit, list(invariance)[worst]
    )


def _versions(origin: Origin) -> dict[str, str]:
    """Of what ran here; a recorded reference's own are where it was recorded."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | dict(origin.versions)
