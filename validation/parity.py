"""validate(): compare token ids, then results, then batch invariance; return a verdict."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..artifact.folder import record_parity
from ..checkpoint.quantization_config import LibraryQuantization
from ..checkpoint.spec import Task
from ..errors import InputError, require
from ..files import written
from ..requirements import installed_versions
from ..runtimes import ModelInfo, load
from ..texts.beir import RetrievalSet, read_beir, write_candidates
from ..texts.ranking import candidate_pairs, rank_documents
from ..texts.samples import Pair, Sample
from .advice import next_steps, other_weights
from .companions import files_gate
from .details import collect_details
from .gates import finite_gate, invariance_gate, retrieval_gates, task_gates, token_gate
from .graphs import Few, graph_gates, run_few
from .invariance import run_suite
from .layers import layer_errors
from .machine import describe_export, describe_machine
from .measures import finite_rows
from .mteb_scores import TaskReport, TaskScore, compare_scores
from .mteb_tasks import open_tasks, run_tasks, runner, task_facts
from .page import render
from .probes import compare_probes, probe_tokens
from .recorded import RecordedReference, is_recorded, open_recorded
from .recording import find_recorded
from .reference import Arithmetic, Inputs, Origin, Reference
from .report import Comparison, Gate, Report, Worst, excerpt
from .retrieval import CANDIDATES, RetrievalReport, compare_quality
from .settings import settings_gate
from .table import table_gate
from .tasks import AnyTask, EmbeddingTask, RerankerTask, choose_inputs
from .thresholds import Thresholds, find_thresholds

logger = logging.getLogger(__name__)

Results = TypeVar("Results")
# Inputs that the report lists.
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
    _check_packages(reference, page=page, retrieval=retrieval, mteb=mteb)
    record_folder = find_recorded(artifact) if record else None
    # An Embedder or a Reranker, depending on the task.
    runtime: Any = load(artifact, device=device, task=task)
    info: ModelInfo = runtime.info
    max_length = runtime.tokenizer.max_length
    if page is not None:
        _check_layers(info)
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
    recorded = None
    if is_recorded(reference):
        if adapter is not None:
            raise InputError(f"{reference} is a recorded reference: record it with `adapter`")
        recorded = open_recorded(reference, info.task, max_length)
        texts, pairs = recorded.choose_inputs(texts, pairs, revision)
        if data is not None:
            recorded.check_set(data)
    inputs = choose_inputs(info.task, texts, pairs, info.prompts)
    is_measured = data is not None or bool(tasks)
    _check_limits(inputs, is_measured, min_cosine, max_score_difference, max_ndcg_loss)
    source: Reference
    if recorded is None:
        from .opening import open_live  # needs torch, which a recorded reference does not

        source = open_live(
            reference,
            task=info.task,
            adapter=adapter,
            max_length=max_length,
            revision=revision,
            device=device,
        )
    else:
        source = recorded
    origin = source.origin
    if isinstance(inputs, RerankerTask):
        inputs = replace(inputs, log_odds=origin.log_odds)
    _check_same_model(info, origin)
    _compare_weights(info, origin)
    rows = inputs.artifact_ids(runtime)
    gate = token_gate(inputs, rows, source.token_ids(inputs.inputs))
    if gate.passed:
        gate = _probe(runtime, source, inputs, gate)
    runtime_device, tokenizer = runtime.device, runtime.tokenizer.tokenizer
    judged = Judged((gate,))
    if gate.passed:
        measured = _measure_artifact(runtime, inputs, rows, data, tasks, progress=progress)
        del runtime  # artifact and reference may not fit into memory together
        pairs = inputs.pairs if isinstance(inputs, RerankerTask) else ()
        settings = source.settings()
        gates = (
            gate,
            settings_gate(info, settings),
            *files_gate(info, (settings or {}).get("max_length"), pairs, rows),
            table_gate(info, source.table(), tokenizer, rows),
            *([] if measured.few is None else graph_gates(info, runtime_device, measured.few)),
        )
        judged = _judge(
            gates, measured, source, inputs, info, thresholds, data, tasks, progress=progress
        )
        if save_run is not None and data is not None:
            width = measured.results.shape[1]
            ranked = rank_documents(measured.set_results, width, data, CANDIDATES)
            write_candidates(Path(save_run), ranked)
    layers = None
    if page is not None and judged.comparisons:
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
        longest=max(map(len, rows)),
        max_length=max_length,
        gates=judged.gates,
        comparisons=judged.comparisons,
        invariance=judged.invariance,
        worst=judged.worst,
        retrieval=judged.retrieval,
        mteb=judged.mteb,
        versions=installed_versions(PACKAGES) | dict(origin.versions),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=describe_machine(info, runtime_device),
        exported=describe_export(info),
        next_steps=next_steps(judged.gates, info, origin, layers),
    )
    if page is not None:
        details = collect_details(
            inputs,
            judged.results,
            judged.expected,
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


@dataclass(frozen=True)
class Measured:
    """The artifact's results.

    Attributes:
        raw: As the artifact gives them: vectors, float32 [texts, dim], or scores, float32 [pairs].
        results: The same, made comparable with the reference's.
        set_results: Those of the retrieval set; None without one.
        task_scores: Its scores on MTEB's tasks.
        invariance: Case of the invariance suite to the worst agreement with the text alone.
        few: Those of a few inputs alone, for comparison with other software; None for a checkpoint.
    """

    raw: np.ndarray
    results: np.ndarray
    set_results: Any
    task_scores: list[TaskScore]
    invariance: dict[str, float]
    few: Few | None


@dataclass(frozen=True)
class Judged:
    """Both sides compared; all but the gates is empty if the token ids differ.

    Attributes:
        gates: In the order in which they are checked.
        comparisons: One for each run of the reference; the gates use the first.
        invariance: As in `Measured`.
        worst: The inputs farthest from the reference, the worst first.
        retrieval: Quality on the retrieval set, if there is one.
        mteb: Scores on MTEB's tasks, if there are any.
        results: The artifact's comparable results.
        expected: Those of the reference's run that the gates use.
    """

    gates: tuple[Gate, ...]
    comparisons: tuple[Comparison, ...] = ()
    invariance: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[Worst, ...] = ()
    retrieval: RetrievalReport | None = None
    mteb: TaskReport | None = None
    results: np.ndarray | None = None
    expected: np.ndarray | None = None


def _check_packages(
    reference: str | Path,
    *,
    page: str | Path | None,
    retrieval: str | Path | RetrievalSet | None,
    mteb: Sequence[Any] | None,
) -> None:
    """Fail now rather than after hours of work."""
    if page is not None:
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


def _check_layers(info: ModelInfo) -> None:
    """Require what the page's table by layer runs in: transformers' own layers."""
    quantization = info.checkpoint and info.checkpoint.quantization
    if isinstance(quantization, LibraryQuantization):
        from ..runtimes.checkpoint import require_library

        require_library(quantization)


def _measure_artifact(
    runtime: Any,
    inputs: AnyTask,
    rows: list[np.ndarray],
    data: RetrievalSet | None,
    tasks: Sequence[Any],
    *,
    progress: bool,
) -> Measured:
    raw = inputs.run(runtime, progress=progress)
    set_results = None if data is None else inputs.run_set(runtime, data, progress=progress)
    task_scores = run_tasks(tasks, runner(runtime, progress=progress), runtime.info)
    invariance = {}
    for outcome in run_suite(runtime.model, rows, runtime.tokenizer.max_length, progress=progress):
        values = inputs.agreement(*map(inputs.comparable, (outcome.results, outcome.alone)))
        invariance[outcome.case] = float(values.min() if inputs.sense == "≥" else values.max())
    artifact = runtime.info.artifact
    has_graph = artifact is not None and artifact.manifest.graph is not None
    few = run_few(runtime.model, rows, raw) if has_graph else None
    return Measured(raw, inputs.comparable(raw), set_results, task_scores, invariance, few)


def _judge(
    first: Sequence[Gate],
    measured: Measured,
    source: Reference,
    inputs: AnyTask,
    info: ModelInfo,
    thresholds: Thresholds,
    data: RetrievalSet | None,
    tasks: Sequence[Any],
    *,
    progress: bool,
) -> Judged:
    """Run the reference and compare; `first` are the gates that need no results."""
    describe = source.origin.describe
    results = measured.results
    runs = _run_reference(source, inputs.inputs, info.precision, progress)
    expected = next(iter(runs.values()))
    if expected.shape[1:] < results.shape[1:]:
        raise InputError(
            f"the artifact's vectors have {results.shape[1]} values and the reference's "
            f"{expected.shape[1]}: give the checkpoint that it was made from"
        )
    comparisons = tuple(
        inputs.compare(results, outputs, describe(arithmetic))
        for arithmetic, outputs in runs.items()
    )
    gates = [
        *first,
        finite_gate(inputs, measured.raw),
        Gate("reference results with NaN", comparisons[0].reference_nonfinite, "≤", 0),
        *inputs.gates(comparisons[0], results, expected, thresholds),
        invariance_gate(inputs, measured.invariance, thresholds),
    ]
    retrieval = task_report = None
    if data is not None:
        quality = inputs.measure(measured.set_results, data)
        dims = tuple(quality.measures)
        reference_quality, arithmetic = _first_finite(
            lambda arithmetic: source.measure(data, dims, arithmetic, progress=progress),
            lambda quality: quality.nonfinite,
            runs,
        )
        retrieval = compare_quality(quality, reference_quality, data, describe(arithmetic))
        gates += retrieval_gates(retrieval, quality, reference_quality, thresholds)
    if tasks:
        live: Any = source  # a recorded reference is refused with tasks
        reference_scores, arithmetic = _first_finite(
            lambda arithmetic: run_tasks(tasks, live.opened(arithmetic, progress=progress), info),
            lambda scores: sum(score.nonfinite for score in scores),
            runs,
        )
        task_report = compare_scores(
            [task_facts(task) for task in tasks],
            measured.task_scores,
            reference_scores,
            version=version("mteb"),
            run=describe(arithmetic),
        )
        gates += task_gates(task_report, measured.task_scores, reference_scores, thresholds)
    return Judged(
        gates=tuple(gates),
        comparisons=comparisons,
        invariance=measured.invariance,
        worst=_find_worst(inputs, results, expected),
        retrieval=retrieval,
        mteb=task_report,
        results=results,
        expected=expected,
    )


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
    task: AnyTask,
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


def _probe(runtime: Any, source: Any, inputs: EmbeddingTask | RerankerTask, tokens: Gate) -> Gate:
    """The gate on token ids for texts beside the inputs; warn if the lengths differ."""
    if isinstance(source, RecordedReference):
        if source.probes is None:
            return tokens
        return compare_probes(runtime, source.probes, inputs, source.max_length)
    length, own = runtime.tokenizer.max_length, source.own_limit
    if length != own:
        logger.warning(
            "%s cuts inputs at %s tokens, and %s at %s: both were run with the first",
            runtime.info.name,
            f"{length:,}",
            source.origin.runner,
            f"{own:,}",
        )
    return probe_tokens(runtime, source, inputs, (runtime.info.folder, source.folder))


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
    difference = other_weights(info, origin)
    if difference and origin.recorded is not None:
        raise InputError(f"{difference}: record a reference of the artifact's checkpoint")
    if difference:
        logger.warning("%s: the comparison may be between two different models", difference)


def _first_finite(
    run: Callable[[Arithmetic], Results],
    nonfinite: Callable[[Results], int],
    arithmetics: Iterable[Arithmetic],
) -> tuple[Results, Arithmetic]:
    """The reference's results in the first arithmetic without NaN or infinity, else the last."""
    *others, last = arithmetics
    for arithmetic in others:
        results = run(arithmetic)
        if not nonfinite(results):
            return results, arithmetic
    return run(last), last


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


def _find_worst(task: AnyTask, results: np.ndarray, expected: np.ndarray) -> tuple[Worst, ...]:
    """The inputs farthest from the reference, starting with those that are not finite."""
    values = task.agreement(results, expected)
    badness = np.where(np.isnan(values), np.inf, -values if task.sense == "≥" else values)
    return tuple(
        Worst(task.names[i], float(values[i]), excerpt(task.texts[i]))
        for i in np.argsort(-badness, kind="stable")[:WORST]
    )
