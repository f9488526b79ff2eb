"""record_reference(): run a checkpoint once and save the results that a validation needs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.spec import Task
from ..checks import check_integer
from ..errors import InputError, require
from ..runtimes.torch import find_device
from ..runtimes.vectors import mrl_dims
from ..texts.beir import RetrievalSet
from ..texts.prompts import check_text, resolve_prompt
from ..texts.samples import Pair, Sample
from .layers import sample_rows
from .live import LiveReference
from .opening import open_live
from .preconditions import check_place, choose_set
from .probes import record_probes
from .recorded import Layers, RecordedReference, describe_set
from .recorded_file import write_recorded
from .reference import Inputs
from .tasks import choose_inputs


def record_reference(
    checkpoint: str | Path,
    output: str | Path,
    texts: Sequence[str | Sample] | None = None,
    pairs: Sequence[tuple[str, str] | Pair] | None = None,
    *,
    task: Task | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str = "auto",
    max_length: int | None = None,
    retrieval: str | Path | RetrievalSet | None = None,
    force: bool = False,
    progress: bool = False,
) -> RecordedReference:
    """Run a checkpoint in its own library and write the results to a file.

    `validate(artifact, reference=FILE)` then needs neither torch nor the checkpoint. The file holds
    the texts or pairs themselves, but only hashes and the retrieval quality of a retrieval set.

    Args:
        checkpoint: A folder or a hub id.
        output: The file; always safetensors, under any name.
        texts: Inputs of an embedding model; a plain string is a document. Default: built-in texts.
        pairs: Inputs of a reranker, (query, document) each. Default: built-in pairs.
        task: "embedding" or "reranker", for a checkpoint that does not declare its task.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.
        revision: A branch, tag or commit of the checkpoint on the hub.
        device: "cpu" or "cuda"; "auto" is torch's GPU if there is one.
        max_length: Tokens after which an input is cut; the library's own limit by default.
        retrieval: A retrieval set to measure as well: a folder in BEIR layout, "builtin", or a
            `RetrievalSet`.
        force: Replace an existing file.
        progress: Show progress bars on a terminal.

    Returns:
        The recorded reference.

    Raises:
        InputError: The inputs are wrong, or the output exists or cannot be written.
        CheckpointError: It is not a complete Qwen3 checkpoint, its library cannot open it, or it
            was replaced meanwhile.
        DeviceError: torch has no GPU, or the checkpoint does not fit into its memory.
        MissingPackageError: torch, transformers or sentence-transformers is not installed.

    >>> recorded = record_reference(checkpoint, folder / "tea.reference", ["tea"], device="cpu")
    >>> validate(embedder, folder / "tea.reference", device="cpu").inputs
    1
    """
    path = Path(output).expanduser()
    check_place(path)
    if path.exists() and not force:
        raise InputError(f"{path} exists; choose another place or replace it with `force`")
    if max_length is not None:
        max_length = check_integer("max_length", max_length)
    if retrieval is not None:
        require("ir_measures", "retrieval")
    source = open_live(
        checkpoint,
        task=task,
        adapter=adapter,
        max_length=max_length,
        revision=revision,
        # `validate` falls back to a CPU, where the artifact is on a GPU that torch has not.
        device=find_device(require("torch", "torch"), device),
    )
    longest = source.spec.max_position_embeddings
    if max_length is not None and not 1 <= max_length <= longest:
        raise InputError(f"max_length should be from 1 to {longest}, found {max_length}")
    data = choose_set(retrieval, task=source.spec.task)
    inputs = choose_inputs(source.spec.task, texts, pairs, source.spec.prompts).inputs
    rows = _check_inputs(source, inputs)
    arithmetics = source.arithmetics()
    results = {name: source.run(inputs, name, progress=progress) for name in arithmetics}
    qualities = {}
    if data is not None:
        width = next(iter(results.values())).shape[-1]
        dims = (0,) if source.spec.task == "reranker" else mrl_dims(width)
        qualities = {
            name: source.measure(data, dims, name, progress=progress) for name in arithmetics
        }
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    recorded = RecordedReference(
        path=path,
        origin=replace(source.origin, recorded=today),
        max_length=source.limit,
        inputs=inputs,
        rows=rows,
        results=results,
        layers=_record_layers(source, rows),
        data=None if data is None else describe_set(data, source.spec.task),
        qualities=qualities,
        probes=record_probes(source),
        declared=source.settings(),
        sketch=source.table(),
        plain=source.tensors(),
    )
    source.spec.source.check_unchanged()
    write_recorded(recorded)
    return recorded


def _check_inputs(source: LiveReference, inputs: Inputs) -> list[list[int]]:
    """Each input's token ids; refuse an input that an artifact would refuse."""
    for i, given in enumerate(inputs):
        for text in asdict(given).values():
            if text is not None:
                check_text(i, text)
        if isinstance(given, Sample):
            resolve_prompt(source.spec.inputs, given.prompt)
    rows = source.token_ids(inputs)
    if [] in rows:
        raise InputError(f"input {rows.index([])} becomes no token: the text is empty")
    return rows


def _record_layers(source: LiveReference, rows: Sequence[Sequence[int]]) -> Layers:
    sample = sample_rows(rows)
    states: Any = source.hidden_states(sample)
    return Layers(
        sample,
        np.stack([np.concatenate(layer_states) for layer_states in states]),
        source.final_norm(),
    )
