"""validate(): compare token ids, then results, then batch invariance; return a verdict."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..artifact.folder import record_parity
from ..checkpoint.spec import Task
from ..checks import check_limit
from ..errors import InputError
from ..files import written
from ..requirements import installed_versions
from ..runtimes import ModelInfo, load
from ..texts.beir import RetrievalSet, write_candidates
from ..texts.ranking import rank_documents
from ..texts.samples import Pair, Sample
from .advice import next_steps
from .companions import files_gate
from .details import collect_details
from .gates import token_gate
from .graphs import graph_gates
from .judge import Judged, judge, measure_artifact
from .layers import layer_errors
from .machine import describe_export, describe_machine
from .mteb_tasks import open_tasks
from .page import render
from .preconditions import (
    check_layers,
    check_limits,
    check_packages,
    check_same_model,
    choose_set,
    compare_weights,
    find_recorded,
)
from .probes import compare_probes, probe_tokens
from .recorded import RecordedReference
from .recorded_file import is_recorded, open_recorded
from .reference import Reference
from .report import Gate, Report
from .retrieval import CANDIDATES
from .settings import settings_gate
from .table import table_gate
from .tasks import AnyTask, RerankerTask, choose_inputs
from .tensors import tensors_gate
from .thresholds import find_thresholds

logger = logging.getLogger(__name__)

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
    weights rounded to fp16 unless any is stored in fp32.

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
        InputError: The inputs are wrong; a limit is out of range, or applies to something that is
            not measured; the reference is a different model; or its file is damaged or of another
            checkpoint.
        ArtifactError: It is not an artifact, its folder is not writable, or it was replaced
            meanwhile.
        CheckpointError: The reference is not a complete Qwen3 checkpoint, or was replaced
            meanwhile.
        DeviceError: The requested device is not available.
        MissingPackageError: torch, transformers or sentence-transformers is not installed, or mteb
            for `mteb`.

    >>> validate(embedder, reference, device="cpu").passed
    True
    """
    min_cosine = check_limit("min_cosine", min_cosine)
    max_score_difference = check_limit("max_score_difference", max_score_difference)
    max_ndcg_loss = check_limit("max_ndcg_loss", max_ndcg_loss)
    check_packages(reference, page=page, retrieval=retrieval, mteb=mteb)
    record_folder = find_recorded(artifact) if record else None
    # An Embedder or a Reranker, depending on the task.
    runtime: Any = load(artifact, device=device, task=task)
    info: ModelInfo = runtime.info
    machine = describe_machine(runtime)
    max_length = runtime.tokenizer.max_length
    if page is not None:
        check_layers(info)
    graph = info.artifact.manifest.graph if info.artifact else None
    thresholds = find_thresholds(
        info.precision,
        arithmetic=graph.arithmetic if graph else "fp32",
        min_cosine=min_cosine,
        max_score_difference=max_score_difference,
        max_ndcg_loss=max_ndcg_loss,
    )
    data = choose_set(retrieval, task=info.task, save_run=save_run)
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
    check_limits(inputs, is_measured, min_cosine, max_score_difference, max_ndcg_loss)
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
    check_same_model(info, origin)
    compare_weights(info, origin)
    rows = inputs.artifact_ids(runtime)
    gate = token_gate(inputs, rows, source.token_ids(inputs.inputs))
    if gate.passed:
        gate = _probe(runtime, source, gate)
    runtime_device, tokenizer = runtime.device, runtime.tokenizer.tokenizer
    judged = Judged((gate,))
    if gate.passed:
        measured = measure_artifact(runtime, inputs, rows, data, tasks, progress=progress)
        del runtime  # artifact and reference may not fit into memory together
        gates = (
            gate,
            *_folder_gates(info, source, inputs, rows, tokenizer),
            *([] if measured.few is None else graph_gates(info, runtime_device, measured.few)),
        )
        judged = judge(
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
    info.check_unchanged()
    if not isinstance(source, RecordedReference):
        source.spec.source.check_unchanged()
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
        machine=machine,
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
    if record_folder is not None and info.artifact is not None:
        record_parity(info.artifact, report.to_record(), report.to_markdown())
    return report


def _probe(runtime: Any, source: Reference, tokens: Gate) -> Gate:
    """The gate on token ids for texts beside the inputs; warn if the lengths differ."""
    if isinstance(source, RecordedReference):
        if source.probes is None:
            return tokens
        return compare_probes(runtime, source.probes, source.max_length)
    length, own = runtime.tokenizer.max_length, source.own_limit
    if length != own:
        logger.warning(
            "%s cuts inputs at %s tokens, and %s at %s: both were run with the first",
            runtime.info.name,
            f"{length:,}",
            source.origin.runner,
            f"{own:,}",
        )
    return probe_tokens(runtime, source, (runtime.info.folder, source.folder))


def _folder_gates(
    info: ModelInfo, source: Reference, inputs: AnyTask, rows: list[np.ndarray], tokenizer: Any
) -> Iterator[Gate]:
    """The gates on what the artifact's folder holds, whatever the inputs give."""
    settings = source.settings()
    pairs = inputs.inputs if isinstance(inputs, RerankerTask) else ()
    yield settings_gate(info, tokenizer, settings)
    yield from files_gate(info, settings or {}, pairs)
    yield table_gate(info, source.table(), tokenizer, rows)
    yield tensors_gate(info, source.tensors())
