"""Every graph in an artifact's folder, as other software runs it.

`validate` measures one graph, on a CPU with embedport's kernels in place of the graph's functions.
Others open that graph without the kernels, and the files beside it: a few of the validated rows run
through each in plain onnxruntime, padded on both sides, and are compared with the artifact's own
results. Weights stay memory-mapped, one graph at a time. OpenVINO's format takes openvino.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from ..artifact.folder import Artifact
from ..artifact.manifest import GraphRecord
from ..artifact.segments import emulate_16_bits
from ..checkpoint.pooling import Head, pool
from ..errors import MissingPackageError, require
from ..requirements import meets
from ..runtimes import ModelInfo
from ..runtimes.comparison import Limits, most_stretch, other_software_limits
from ..runtimes.part_session import open_session
from ..runtimes.vectors import cosines
from ..texts.prompts import RerankerTokenizer
from .invariance import Model, pad
from .measures import sigmoid
from .report import Gate

GATE, NOT_RUN = "graphs that differ", "graphs that were not run"
ROWS = 4
# Rows are cut at the front to this many tokens: enough for the attention of rows of over 128.
LONGEST = 160
# Rows of a batch, and the padding beyond the longer one.
BATCH, EXTRA = 2, 3
# What a graph may take besides the tokens, without a prompt and without a prefix.
NOTHING = {"prompt_length": np.zeros(1, np.int64), "kept": np.zeros(1, np.int64)}
NOTHING |= {"short": np.array(True)}
# OpenVINO's arithmetic on any CPU.
F32 = {"INFERENCE_PRECISION_HINT": "f32"}
# An error of a runtime, in a line of the report.
EXCERPT = 200


@dataclass(frozen=True)
class Few:
    """A few rows, int64 [tokens] each, and the artifact's own results for each alone."""

    rows: list[np.ndarray]
    results: np.ndarray


class Opened(NamedTuple):
    """A graph that is ready to run.

    Attributes:
        inputs: Name to shape; a dimension that is not fixed is no integer.
        run: Maps inputs by name to outputs by name.
    """

    inputs: Mapping[str, Sequence[Any]]
    run: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]


def run_few(model: Model, rows: Sequence[np.ndarray], results: np.ndarray) -> Few:
    """Run a few of the validated rows alone: short ones, of all lengths or of all scores.

    Args:
        model: The artifact.
        rows: Token ids, int64 [tokens] each.
        results: The artifact's results for them: float32 [rows, dim], or scores, [rows].
    """
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    short = [i for i in by_length if len(rows[i]) <= LONGEST] or by_length[: ROWS**2]
    if results.ndim == 1:
        short.sort(key=lambda i: float(results[i]))
    chosen = [short[i] for i in np.linspace(0, len(short) - 1, ROWS).round().astype(int)]
    few = [rows[i][-LONGEST:] for i in dict.fromkeys(chosen)]
    alone = [model(ids[None], np.ones_like(ids[None]))[0] for ids in few]
    return Few(few, np.stack(alone))


def graph_gates(info: ModelInfo, device: str, few: Few) -> list[Gate]:
    """No graph of the folder gives other results than the artifact.

    Args:
        info: The artifact, with a graph.
        device: The device that the artifact ran on.
        few: From `run_few`.
    """
    assert info.artifact is not None
    limits = other_software_limits(info.artifact.manifest)
    few = replace(few, rows=[np.append(few.rows[0], _skipped_end(info)), *few.rows[1:]])
    differences, left = [], _not_run(info.artifact, device)
    run = 0
    for name, outputs in _graphs(info.artifact).items():
        path = info.artifact.folder / name
        try:
            opened = _open_openvino(path) if path.suffix == ".xml" else _open_onnx(path)
        except MissingPackageError as error:
            left.append(f"{name}: {error}")
            continue
        except Exception as error:  # the runtimes' own classes, all of them plain Exceptions
            differences.append(f"{name}: it cannot be opened: {str(error)[:EXCERPT]}")
        else:
            differences += [
                f"{name}: {text}" for text in _compare(opened, outputs, info, few, limits)
            ]
            del opened  # before the next one is opened
        run += 1
    wrong = {text.partition(":")[0] for text in differences}
    basis = f"of {run}, run as other software runs them"
    gates = [Gate(GATE, len(wrong), "≤", 0, "; ".join(differences), basis)]
    if left:
        gates.append(Gate(NOT_RUN, None, "≤", 0, basis="; ".join(left)))
    return gates


def _skipped_end(info: ModelInfo) -> np.ndarray:
    """The padding with which a classifier's row may end: embedport cuts it off, others do not."""
    skipped = info.inputs.skipped_token
    if skipped is not None:
        inputs = replace(info.inputs, skipped_token=None)
        tokenizer = RerankerTokenizer(info.folder / "tokenizer.json", info.max_length, inputs)
        text = tokenizer.tokenizer.id_to_token(skipped)
        if text is not None and tokenizer.encode([("", text)]).ids[0][-1] == skipped:
            return np.array([skipped])
    return np.zeros(0, np.int64)


def _graphs(artifact: Artifact) -> dict[str, tuple[str, ...]]:
    """The paths of the graphs and the outputs that others read; of equal files the first."""
    graph = artifact.manifest.graph
    assert graph is not None
    named = {graph.path: graph.outputs}
    if graph.continuation is not None and _runs_here(graph):
        named[graph.continuation.path] = graph.outputs
    if graph.shared is not None:
        named |= dict.fromkeys(graph.shared.paths, graph.shared.outputs)
        if graph.shared.openvino is not None:
            named[graph.shared.openvino] = ()
    firsts = {artifact.manifest.files[name].sha256: name for name in reversed(named)}
    return {name: outputs for name, outputs in named.items() if name in firsts.values()}


def _runs_here(graph: GraphRecord) -> bool:
    """Whether this onnxruntime takes the continuation; `load` runs the main graph otherwise."""
    assert graph.continuation is not None
    return meets(graph.continuation.requires, require("onnxruntime", "cpu").__version__)


def _not_run(artifact: Artifact, device: str) -> list[str]:
    """The files that only another device or version runs, and why."""
    graph, engine = artifact.manifest.graph, artifact.manifest.engine
    assert graph is not None
    left = []
    if engine is not None and device == "cpu":
        left.append(f"{engine.path}: it runs on a GPU, and its graph ran on the CPU")
    if graph.continuation is not None and not _runs_here(graph):
        left.append(f"{graph.continuation.path}: it needs {graph.continuation.requires}")
    return left


def _open_onnx(path: Path) -> Opened:
    """A graph in onnxruntime, without embedport's kernels; 16 bits are rounded as on a GPU."""
    model = ir.load(path)
    emulate_16_bits(model)
    session = open_session(model, path.parent, pack=False)
    names = [value.name for value in session.get_outputs()]
    return Opened(
        {value.name: value.shape for value in session.get_inputs()},
        lambda feeds: dict(zip(names, session.run(names, feeds), strict=True)),
    )


def _open_openvino(path: Path) -> Opened:
    if find_spec("openvino") is None:
        raise MissingPackageError("openvino is not installed: pip install openvino")
    openvino = import_module("openvino")
    compiled = openvino.Core().compile_model(str(path), "CPU", F32)
    return Opened(
        {value.any_name: () for value in compiled.inputs},
        lambda feeds: {value.any_name: array.copy() for value, array in compiled(feeds).items()},
    )


def _compare(
    opened: Opened, outputs: Sequence[str], info: ModelInfo, few: Few, limits: Limits
) -> Iterator[str]:
    """Compare a graph's results with the artifact's; yields each difference, in words."""
    try:
        found = _run(opened, info, few.rows)
    except Exception as error:  # the runtimes' own classes, all of them plain Exceptions
        yield f"it cannot be run: {str(error)[:EXCERPT]}"
        return
    missing = [name for name in outputs if name not in found]
    if missing or not found:
        yield f"it lacks the output {', '.join(missing) or 'that others read'}"
    for name, results in found.items():
        if (difference := _difference(results, few.results, limits)) is not None:
            yield f"{name} {difference}"


def _run(opened: Opened, info: ModelInfo, rows: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Each output, made into what the artifact gives, for the rows in padded batches."""
    batches = []
    for start in range(0, len(rows), BATCH):
        side = "left" if start % (2 * BATCH) == 0 else "right"
        ids, mask = pad(rows[start : start + BATCH], side, EXTRA)
        feeds = {"input_ids": ids, "attention_mask": mask, **NOTHING}
        if "past" in opened.inputs:
            shape = [size if isinstance(size, int) else 0 for size in opened.inputs["past"]]
            feeds["past"] = np.zeros(shape, np.float32)
        outputs = opened.run({name: feeds[name] for name in opened.inputs})
        batches.append(
            {
                name: reading(output, mask, info)
                for name, output in outputs.items()
                if (reading := _READINGS.get(name)) is not None
            }
        )
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def _pooled(states: np.ndarray, mask: np.ndarray, info: ModelInfo) -> np.ndarray:
    return Head(info.outputs, info.folder)(pool(states, mask, info.outputs))


def _activated(logits: np.ndarray, mask: np.ndarray, info: ModelInfo) -> np.ndarray:
    return sigmoid(logits[:, 0]) if info.outputs.activation == "sigmoid" else logits[:, 0]


# How a reader of an output gets a text's vector, or a pair's score.
_READINGS: Mapping[str, Callable[[np.ndarray, np.ndarray, ModelInfo], np.ndarray]] = {
    "sentence_embedding": lambda vectors, mask, info: vectors,
    "last_hidden_state": _pooled,
    "score": lambda scores, mask, info: scores,
    "logits": _activated,
}


def _difference(found: np.ndarray, expected: np.ndarray, limits: Limits) -> str | None:
    """How far results are from the artifact's, if that is beyond the limits."""
    if found.shape != expected.shape:
        return f"has the shape {list(found.shape)}, and the artifact's {list(expected.shape)}"
    if expected.ndim == 1:
        apart = float(np.abs(found.astype(np.float64) - expected).max())
        if not apart <= limits.max_difference:  # NaN is a difference
            return f"is {apart:.2e} from the artifact's (limit {limits.max_difference:g})"
        return None
    cosine = float(cosines(found, expected).min())
    if not cosine >= limits.min_cosine:
        return f"has a cosine of {cosine:.6f} to the artifact's (limit {limits.min_cosine:g})"
    lengths, own = (np.linalg.norm(x.astype(np.float64), axis=1) for x in (found, expected))
    stretch, limit = float(np.abs(lengths / own - 1).max()), most_stretch(limits.min_cosine)
    if not stretch <= limit:
        return f"has a length {stretch:.2e} from the artifact's (limit {limit:.2e})"
    return None
