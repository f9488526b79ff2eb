"""validate(): compare token ids, then results, then batch invariance; return a verdict."""

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

from ..artifact.folder import record_parity
from ..checkpoint.quantization_config import LibraryQuantization
from ..checkpoint.spec import Task
from ..errors import InputError, require
from ..files import written
from ..runtimes import ModelInfo, load
from ..texts.beir import RetrievalSet, read_beir, write_candidates
from ..texts.ranking import candidate_pairs, rank_documents
from ..texts.samples import Pair, Sample
from .advice import next_steps, other_weights
from .details import collect_details
from .invariance import run_suite
from .layers import layer_errors
from .machine import describe_export, describe_machine
from .measures import finite_rows
from .mteb_scores import TaskReport, TaskScore, compare_scores
from .mteb_tasks import open_tasks, run_tasks, runner, task_facts
from .page import render
from .recorded import is_recorded, open_recorded
from .recording import find_recorded
from .reference import Arithmetic, Inputs, Origin, Reference
from .report import Comparison, Gate, Report, Worst, excerpt
from .retrieval import CANDIDATES, SetQuality, compare_quality
from .tasks import EmbeddingTask, RerankerTask, choose_inputs
from .thresholds import Thresholds, find_thresholds

logger = logging.getLogger(__name__)

WORST = 10
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
    mteb: Sequence[Any] | None = None,
    max_ndcg_loss: float | None = None,
    save_run: str | Path | None = None,
    page: str | Path | None = None,
    command: Sequence[str] = (),
    record: bool = True,
    progress: bool = False,
    task: Task | None = None,
) -> Report:
    """Compare an artifact, or a checkpoint, with the checkpoint it was made from.

    The reference checkpoint runs in its own library: sentence-transformers if its folder declares a
    pipeline for it, otherwise transformers with the model cards' code. On a GPU it runs in fp16,
    and a second time in fp32 if that fits, otherwise in bf16. On a CPU it runs in fp32, with
    weights rounded to fp16 unless the checkpoint stores fp32.

    The gates use the fp16 run; for an fp32 artifact they use the fp32 run, because fp16 is too
    coarse. Either is replaced by a run with fewer NaN or infinite results. Token ids are compared
    first; if they differ, nothing else is measured.

    Args:
        artifact: The artifact's folder, or a checkpoint as for `embedport.load`.
        reference: The original checkpoint: a folder or a hub id. Or a file that `record_reference`
            wrote, which holds its own texts or pairs; it needs neither torch nor the checkpoint.
        texts: Inputs of an embedding model; a plain string is a document. Default: built-in texts.
        pairs: Inputs of a reranker, (query, document) each. Default: built-in pairs.
        revision: A branch, tag or commit of the reference on the hub.
        adapter: The folder or hub id of a LoRA adapter to merge into the reference's weights.
        device: The artifact's device, as for `embedport.load`. The reference runs on torch's GPU if
            there is one, unless this is "cpu".
        min_cosine: Replaces the precision's limit.
        max_score_difference: Replaces the precision's limit.
        retrieval: A retrieval set to measure as well: a folder in BEIR layout, "builtin", or a
            `RetrievalSet`.
        mteb: MTEB's tasks to run on both sides: names such as "STS17", or tasks of mteb's classes.
            Each task's loss has the limit of nDCG@10.
        max_ndcg_loss: Replaces the precision's limit.
        save_run: File for each query's 50 best documents, which a reranker can take as candidates;
            for an embedding artifact.
        page: File for the HTML report with charts; needs the extra "report".
        command: The command line, shown in the HTML report.
        record: Write the figures, but none of the texts, into the artifact's manifest and model
            card, even if a gate fails. Checkpoints without a manifest and folders in the hub's
            cache are left unchanged.
        progress: Show progress bars on a terminal.
        task: "embedding" or "reranker", for a checkpoint that does not declare its task.

    Returns:
        The report; `passed` says whether all gates hold.

    Raises:
        InputError: The inputs are wrong; a limit applies to something that is not measured; the
            reference is a different model; or its file is damaged or of another checkpoint.
        ArtifactError: It is not an artifact, or its folder is not writable.
        CheckpointError: The reference is not a complete Qwen3 checkpoint.
        DeviceError: The requested device is not available.
        MissingPackageError: torch, transformers or sentence-transformers is not installed, or mteb
            for `mteb`.

    >>> validate(embedder, reference, device="cpu").passed
    True
    """
    if page is not None:  # fail now rather than after hours of work
        require("jinja2", "report")
        require("matplotlib", "report")
    if retrieval is not None:
        require("ir_measures", "retrieval")
    if mteb is not None:
        if is_recorded(reference):
            raise InputError(
                f"{reference} is a recorded reference, which has no results of MTEB's tasks: give "
                "the checkpoint itself"
            )
        require("mteb", "mteb")
    record_folder = find_recorded(artifact) if record else None
    # An Embedder or a Reranker, depending on the task.
    runtime: Any = load(artifact, device=device, task=task)
    runtime_device = runtime.device
    info: ModelInfo = runtime.info
    quantization = info.checkpoint and info.checkpoint.quantization
    if page is not None and isinstance(quantization, LibraryQuantization):
        from ..runtimes.checkpoint import require_library

        require_library(quantization)  # the layer table runs transformers' own layers
    graph = info.artifact.manifest.graph if info.artifact else None
    thresholds = find_thresholds(
        info.precision,
        arithmetic=graph.arithmetic if graph else "fp32",
        min_cosine=min_cosine,
        max_score_difference=max_score_difference,
        max_ndcg_loss=max_ndcg_loss,
    )
    data = _choose_set(retrieval, task=info.task, save_run=save_run)
    tasks = [] if mteb is None else open_tasks(mteb, info.task)
    recorded_reference = None
    if is_recorded(reference):
        if adapter is not None:
            raise InputError(f"{reference} is a recorded reference: record it with `adapter`")
        recorded_reference = open_recorded(reference, info.task, runtime.tokenizer.max_length)
        texts, pairs = recorded_reference.choose_inputs(texts, pairs, revision)
        if data is not None:
            recorded_reference.check_set(data)
    inputs = choose_inputs(info.task, texts, pairs, info.prompts)
    measured = data is not None or bool(tasks)
    _check_limits(inputs, measured, min_cosine, max_score_difference, max_ndcg_loss)
    source: Reference = (
        _open_live(reference, info.task, adapter, runtime.tokenizer.max_length, revision, device)
        if recorded_reference is None
        else recorded_reference
    )
    origin = source.origin
    if isinstance(inputs, RerankerTask):
        inputs = replace(inputs, log_odds=origin.log_odds)
    _check_same_model(info, origin)
    _compare_weights(info, origin)
    rows = inputs.artifact_ids(runtime)
    expected_rows = source.token_ids(inputs.inputs)
    gates = [_token_gate(inputs, rows, expected_rows)]
    comparisons: list[Comparison] = []
    invariance: dict[str, float] = {}
    worst: list[Worst] = []
    quality = task_report = None
    results = expected = None
    if gates[0].passed:
        raw_results = inputs.run(runtime, progress=progress)
        results = inputs.comparable(raw_results)
        # Vectors of queries and documents, or scores of pairs, depending on the task.
        set_results: Any = (
            None if data is None else inputs.run_set(runtime, data, progress=progress)
        )
        task_scores = run_tasks(tasks, runner(runtime, progress=progress), info)
        for outcome in run_suite(
            runtime.model, rows, runtime.tokenizer.max_length, progress=progress
        ):
            values = inputs.agreement(*map(inputs.comparable, (outcome.found, outcome.alone)))
            invariance[outcome.case] = float(values.min() if inputs.sense == "≥" else values.max())
        del runtime  # artifact and reference may not fit into memory together
        runs = _run_reference(source, inputs.inputs, info.precision, progress)
        comparisons = [
            inputs.compare(results, outputs, origin.describe(arithmetic))
            for arithmetic, outputs in runs.items()
        ]
        expected = runs[next(iter(runs))]
        worst = _find_worst(inputs, results, expected)
        gates += [
            _finite_gate(inputs, raw_results),
            Gate("reference results with NaN", comparisons[0].reference_nonfinite, "≤", 0),
            *inputs.gates(comparisons[0], results, expected, thresholds),
            _invariance_gate(inputs, invariance, thresholds),
        ]
        if data is not None:
            artifact_quality = inputs.measure(set_results, data)
            reference_quality, set_arithmetic = _measure_reference(
                source, data, tuple(artifact_quality.measures), runs, progress
            )
            quality = compare_quality(
                artifact_quality, reference_quality, data, origin.describe(set_arithmetic)
            )
            gates += [
                Gate("retrieval: NaN or infinity", artifact_quality.nonfinite, "≤", 0),
                Gate("retrieval: reference's NaN", reference_quality.nonfinite, "≤", 0),
                Gate("nDCG@10 loss", quality.ndcg_loss, "≤", thresholds.max_ndcg_loss),
            ]
            if save_run is not None:
                write_candidates(
                    Path(save_run),
                    rank_documents(set_results, results.shape[1], data, CANDIDATES),
                )
        if tasks:
            reference_scores, task_arithmetic = _run_tasks(source, tasks, info, runs, progress)
            task_report = compare_scores(
                [task_facts(task) for task in tasks],
                task_scores,
                reference_scores,
                version=version("mteb"),
                run=origin.describe(task_arithmetic),
            )
            gates += _task_gates(task_report, task_scores, reference_scores, thresholds)
    layers = None
    if page is not None and comparisons:
        torch_device = "cpu" if runtime_device == "cpu" else "cuda"
        layers = layer_errors(info, source, rows, device=torch_device)
    report = Report(
        artifact=str(artifact),
        precision=info.precision,
        device=runtime_device,
        reference=origin.pinned,
        library=origin.runner,
        task=info.task,
        inputs=len(rows),
        tokens=sum(map(len, rows)),
        gates=tuple(gates),
        comparisons=tuple(comparisons),
        invariance=invariance,
        worst=tuple(worst),
        retrieval=quality,
        mteb=task_report,
        versions=_versions(origin),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(info, runtime_device),
        exported=describe_export(info),
        next_steps=next_steps(gates, info, origin, layers),
    )
    if page is not None:
        details = collect_details(
            inputs,
            results,
            expected,
            info=info,
            reference=origin,
            layers=layers,
            command=command,
        )
        text = render(report, details)
        with written(Path(page)) as file:
            file.write(text.encode())
    if record_folder is not None:
        record_parity(record_folder, report.to_record(), report.to_markdown())
    return report


def _choose_set(
    retrieval: str | Path | RetrievalSet | None, *, task: Task, save_run: str | Path | None
) -> RetrievalSet | None:
    if save_run is not None and (retrieval is None or task == "reranker"):
        raise InputError("`save_run` writes what an embedding artifact finds: give `retrieval` too")
    if retrieval is None or isinstance(retrieval, RetrievalSet):
        data = retrieval
    else:
        data = read_beir(retrieval)
    if data is not None and task == "reranker":
        candidate_pairs(data)  # fail now rather than after hours of work
    return data


def _check_limits(
    task: EmbeddingTask | RerankerTask,
    measured: bool,
    min_cosine: float | None,
    max_score_difference: float | None,
    max_ndcg_loss: float | None,
) -> None:
    """Refuse a limit that no gate would check."""
    if min_cosine is not None and isinstance(task, RerankerTask):
        raise InputError("a reranker gives scores, not vectors: `max_score_difference` limits them")
    if max_score_difference is not None and isinstance(task, EmbeddingTask):
        kinds = set(task.is_query.tolist())
        if len(kinds) == 1:
            raise InputError(
                "`max_score_difference` limits the scores of queries and documents, found "
                f"{'queries' if kinds.pop() else 'documents'} only: give texts of both kinds, each "
                "with its prompt"
            )
    if max_ndcg_loss is not None and not measured:
        raise InputError(
            "`max_ndcg_loss` limits what is lost on a set or a task: give `retrieval` or `mteb` too"
        )


def _open_live(
    reference: str | Path,
    task: Task,
    adapter: str | Path | None,
    max_length: int,
    revision: str | None,
    device: str,
) -> Reference:
    from .opening import open_live  # needs torch, which a recorded reference does not

    return open_live(
        reference,
        task=task,
        adapter=adapter,
        max_length=max_length,
        revision=revision,
        device=device,
    )


def _check_same_model(info: ModelInfo, origin: Origin) -> None:
    sizes = (info.hidden_size, info.vocab_size)
    if sizes != (origin.hidden_size, origin.vocab_size):
        raise InputError(
            f"the artifact was made from {info.source}, with hidden_size and vocab_size "
            f"{sizes}; the reference {origin.id} has {(origin.hidden_size, origin.vocab_size)}"
        )


def _compare_weights(info: ModelInfo, origin: Origin) -> None:
    """Warn if the artifact was made from other weight files than the reference's.

    Raises:
        InputError: The reference is recorded and its weight files differ.
    """
    words = other_weights(info, origin)
    if words and origin.recorded is not None:
        raise InputError(f"{words}: record a reference of the artifact's checkpoint")
    if words:
        logger.warning("%s: the comparison may be between two different models", words)


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
    """The reference's quality in the first arithmetic without NaN or infinity, else the last."""
    remaining = list(runs)
    while True:
        arithmetic = remaining.pop(0)
        quality = source.measure(data, dims, arithmetic, progress=progress)
        if not remaining or not quality.nonfinite:
            return quality, arithmetic


def _run_tasks(
    source: Any,
    tasks: Sequence[Any],
    info: ModelInfo,
    runs: Mapping[Arithmetic, np.ndarray],
    progress: bool,
) -> tuple[list[TaskScore], Arithmetic]:
    """The reference's results of MTEB's tasks, and the arithmetic, as in `_measure_reference`."""
    remaining = list(runs)
    while True:
        arithmetic = remaining.pop(0)
        run = source.opened(arithmetic, progress=progress)
        scores = run_tasks(tasks, run, info)
        del run  # and the model: the next arithmetic's may not fit beside it
        if not remaining or not any(score.nonfinite for score in scores):
            return scores, arithmetic


def _task_gates(
    report: TaskReport,
    found: Sequence[TaskScore],
    expected: Sequence[TaskScore],
    thresholds: Thresholds,
) -> list[Gate]:
    nonfinite, reference = (sum(score.nonfinite for score in side) for side in (found, expected))
    return [
        Gate("MTEB: NaN or infinity", nonfinite, "≤", 0),
        Gate("MTEB: reference's NaN", reference, "≤", 0),
        *(
            Gate(f"{row.task}: {row.measure} loss", -row.difference, "≤", thresholds.max_ndcg_loss)
            for row in report.rows
        ),
    ]


def _run_reference(
    source: Reference, inputs: Inputs, precision: str, progress: bool
) -> dict[Arithmetic, np.ndarray]:
    """Run the reference in each arithmetic; the run that the gates use comes first."""
    outputs: dict[Arithmetic, np.ndarray] = {
        arithmetic: source.run(inputs, arithmetic, progress=progress)
        for arithmetic in source.arithmetics()
    }
    preferred = "fp32" if precision == "fp32" else "fp16"
    order = sorted(
        outputs,
        key=lambda name: (int((~finite_rows(outputs[name])).sum()), name != preferred),
    )
    return {arithmetic: outputs[arithmetic] for arithmetic in order}


def _find_worst(
    task: EmbeddingTask | RerankerTask, found: np.ndarray, expected: np.ndarray
) -> list[Worst]:
    """The inputs farthest from the reference, starting with those that are not finite."""
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
    # argmin and argmax return the first NaN, if there is one.
    worst = int(np.argmin(values) if task.sense == "≥" else np.argmax(values))
    limit = task.invariance_limit(thresholds)
    return Gate(
        "batch invariance", float(values[worst]), task.sense, limit, list(invariance)[worst]
    )


def _versions(origin: Origin) -> dict[str, str]:
    """Package versions: those installed here, overridden by the ones the reference ran with."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions | dict(origin.versions)
