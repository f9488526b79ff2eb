"""Graphs that validate itself does not run: a wrong one fails, whoever opens it."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import embedport
from embedport.machine.engine import EngineRecord, Profile
from embedport.runtimes import read_info
from embedport.texts.samples import Sample, builtin_pairs, builtin_samples
from embedport.validation import graphs
from embedport.validation.graphs import GATE, NOT_RUN, Few, Opened, graph_gates, run_few
from embedport.validation.machine import describe_code

TEXTS = [sample.text for sample in builtin_samples()[:24]]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()[:4]]
FOR = ("sentence-transformers", "older-onnxruntime")
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def results():
    """A function (folder of a sound artifact) -> its own results for a few rows."""
    made = {}

    def run(folder):
        if folder not in made:
            loaded: Any = embedport.load(folder, device="cpu")
            texts = PAIRS if loaded.info.task == "reranker" else TEXTS
            rows = loaded.tokenizer.encode(texts).ids
            alone = [loaded.model(ids[None], np.ones_like(ids[None]))[0] for ids in rows]
            made[folder] = run_few(loaded.model, rows, np.stack(alone))
        return made[folder]

    return run


def change_weights(path: Path) -> None:
    """Give one graph a matrix of its own, with its outputs in another order."""
    model = ir.load(path)
    name, value = next(
        (name, value)
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor) and "v_proj" in name
    )
    assert value.const_value is not None
    values = np.roll(value.const_value.numpy(), 1, axis=-1)
    value.const_value = ir.tensor(values, name=name)
    ir.save(model, path)


def change_function(path: Path) -> None:
    """Exchange cosines and sines, where onnxruntime computes them and not embedport's kernels."""
    model = onnx.load(path, load_external_data=False)
    (function,) = [each for each in model.functions if each.name == "CosSin"]
    for node in function.node:
        node.op_type = {"Cos": "Sin", "Sin": "Cos"}[node.op_type]
    path.write_bytes(model.SerializeToString())


def follow(output: str, operator: str) -> Change:
    """A change that puts an operator behind an output."""

    def change(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for names in (node.input, node.output):
                for i, name in enumerate(names):
                    if name == output:
                        names[i] = "before"
        inputs = ["before"] * (2 if operator in ("Add", "Div") else 1)
        model.graph.node.append(onnx.helper.make_node(operator, inputs, [output], "output/last"))
        path.write_bytes(model.SerializeToString())

    return change


def rename_output(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.output[0].name = "token_embeddings"
    model.graph.node.append(
        onnx.helper.make_node(
            "Identity", ["last_hidden_state"], ["token_embeddings"], "output/last"
        )
    )
    path.write_bytes(model.SerializeToString())


def add_input(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    model.graph.input.append(
        onnx.helper.make_tensor_value_info("token_type_ids", onnx.TensorProto.INT64, [None])
    )
    path.write_bytes(model.SerializeToString())


WRONG: list[tuple[str, str, Change, str]] = [
    ("embedding", "model", change_weights, "sentence_embedding has a cosine of "),
    (
        "embedding",
        "model",
        follow("last_hidden_state", "Neg"),
        "last_hidden_state has a cosine of -1",
    ),
    (
        "embedding",
        "model",
        follow("sentence_embedding", "Add"),
        "sentence_embedding has a length 1",
    ),
    (
        "embedding",
        "model",
        follow("last_hidden_state", "Log"),
        "last_hidden_state has a cosine of nan",
    ),
    ("embedding", "embedport", change_function, "sentence_embedding has a cosine of "),
    ("embedding", "model", rename_output, "it lacks the output last_hidden_state"),
    ("embedding", "model", add_input, "it cannot be run: 'token_type_ids'"),
    ("embedding", "model", lambda path: path.write_bytes(b"x"), "it cannot be opened: "),
    ("reranker", "embedport", change_weights, "score is "),
    ("reranker", "embedport", follow("logits", "Neg"), "logits is "),
    ("reranker", "model", change_weights, "logits is "),
    ("reranker", "model", follow("score", "Sqrt"), "score is "),
    ("reranker", "continuation", change_weights, "score is "),
]


@pytest.mark.parametrize(("task", "name", "change", "words"), WRONG)
def test_a_wrong_graph(folders, changed, results, task, name, change, words):
    artifact = folders(task, consumers=FOR).artifact
    folder = changed(artifact, change, f"onnx/{name}.onnx")
    (gate,) = graph_gates(read_info(folder), "cpu", results(artifact))
    assert (gate.name, gate.value, gate.failed) == (GATE, 1, True)
    assert f"onnx/{name}.onnx: {words}" in gate.detail


SOUND = [
    ("embedding", 2, {"consumers": FOR}),
    ("embedding", 2, {"consumers": FOR, "precision": "int8"}),
    ("embedding", 2, {"consumers": ("sentence-transformers",), "precision": "bf16"}),
    ("embedding", 2, {"consumers": ("sentence-transformers",), "dialect": "standard"}),
    ("embedding", 1, {"outputs": "hidden"}),
    ("embedding", 1, {"dim": 32}),
    ("reranker", 3, {"consumers": FOR}),
    ("reranker", 2, {"precision": "int8"}),
]


@pytest.mark.parametrize(("task", "count", "options"), SOUND)
def test_sound_graphs(folders, results, task, count, options):
    folder = folders(task, **options).artifact
    (gate,) = graph_gates(read_info(folder), "cpu", results(folder))
    assert (gate.value, gate.detail) == (0, "")
    assert gate.basis == f"of {count}, run as other software runs them"


def test_rows_are_padded_on_both_sides(folders, results, monkeypatch):
    folder, open_onnx, masks = folders("embedding").artifact, graphs._open_onnx, []

    def watched(path: Path) -> Opened:
        inputs, run = open_onnx(path)

        def watch(feeds):
            masks.append(feeds["attention_mask"])
            return run(feeds)

        return Opened(inputs, watch)

    monkeypatch.setattr(graphs, "_open_onnx", watched)
    graph_gates(read_info(folder), "cpu", results(folder))
    ends = [(mask[:, 0].all(), mask[:, -1].all()) for mask in masks]
    assert ends == [(False, True), (True, False)]


def test_vectors_of_another_width_or_length(folders, results):
    folder = folders("embedding").artifact
    few = results(folder)
    narrow = replace(few, results=few.results[:, :63])
    (gate,) = graph_gates(read_info(folder), "cpu", narrow)
    assert gate.failed
    assert "has the shape [4, 64], and the artifact's [4, 63]" in gate.detail
    longer = replace(few, results=2 * few.results)
    (gate,) = graph_gates(read_info(folder), "cpu", longer)
    assert "has a length 5.00e-01 from the artifact's" in gate.detail


def test_equal_files_run_once(folders, changed, results):
    """transformers.js looks for the same graph under another name."""
    artifact = folders("embedding", consumers=("transformers.js",), precision="int8").artifact
    few = results(artifact)
    (gate,) = graph_gates(read_info(artifact), "cpu", few)
    assert gate.title == "graphs that differ (of 2, run as other software runs them)"
    folder = changed(artifact, change_weights, "onnx/model_quantized.onnx")
    (gate,) = graph_gates(read_info(folder), "cpu", few)
    assert gate.value == 1
    assert gate.detail.startswith("onnx/model_quantized.onnx: last_hidden_state has a cosine of ")
    assert gate.basis.startswith("of 3, ")


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_nothing_else_fails(folders, changed, tmp_path, task):
    """With the checkpoint and with a recorded reference."""
    made, recorded = folders(task, consumers=FOR), tmp_path / "model.reference"
    texts = [Sample("What is tea?", "query"), Sample("A leaf from China.")]
    inputs: dict[str, Any] = {"texts": texts} if task == "embedding" else {"pairs": PAIRS[:2]}
    embedport.record_reference(made.checkpoint, recorded, task=task, device="cpu", **inputs)
    folder = changed(made.artifact, change_weights, "onnx/model.onnx")
    for reference, given in ((made.checkpoint, inputs), (recorded, {})):
        report = embedport.validate(folder, reference, device="cpu", record=False, **given)
        assert [gate.name for gate in report.gates if gate.failed] == [GATE]
        assert report.next_steps == (
            "Export it again: other software gets other results from a graph of the folder.",
        )


def test_openvino(folders, changed, results, monkeypatch):
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")

    def negate(path: Path) -> None:
        weights = np.memmap(path, np.float32, "r+")
        weights[len(weights) // 2 :] *= -1
        weights.flush()

    artifact = folders("embedding", consumers=("openvino",)).artifact
    few = results(artifact)
    (gate,) = graph_gates(read_info(artifact), "cpu", few)
    assert (gate.value, gate.basis[:5]) == (0, "of 2,")
    folder = changed(artifact, negate, "openvino/openvino_model.bin")
    (gate,) = graph_gates(read_info(folder), "cpu", few)
    assert gate.value == 1
    assert gate.detail.startswith("openvino/openvino_model.xml: ")
    monkeypatch.setattr(graphs, "find_spec", lambda name: None)
    gate, left = graph_gates(read_info(folder), "cpu", few)
    assert (gate.value, gate.basis[:5]) == (0, "of 1,")
    assert (left.passed, left.title) == (
        None,
        f"{NOT_RUN} (openvino/openvino_model.xml: openvino is not installed: pip install openvino)",
    )


def test_what_does_not_run_here(folders, results, monkeypatch):
    """It is said, and is no pass: a continuation for a later version, an engine for a GPU."""
    folder = folders("reranker").artifact
    info, few = read_info(folder), results(folder)
    monkeypatch.setattr(graphs, "meets", lambda needed, version: False)
    gate, left = graph_gates(info, "cpu", few)
    assert (gate.value, gate.basis[:5]) == (0, "of 1,")
    assert left.basis.startswith("onnx/continuation.onnx: it needs onnxruntime>=")
    monkeypatch.undo()
    assert info.artifact is not None
    profiles = (Profile((1, 1), (1, 8), (1, 8)),)
    engine = EngineRecord(
        "engine/model.plan", None, "10.0", False, "none", profiles, "tensorrt-rtx", ()
    )
    manifest = replace(info.artifact.manifest, engine=engine)
    info = replace(info, artifact=replace(info.artifact, manifest=manifest))
    assert describe_code(info, "cuda", None) == "TensorRT for RTX 10.0"
    assert "onnxruntime's operators" in describe_code(info, "cpu", None)
    _, left = graph_gates(info, "cpu", few)
    assert (left.value, left.basis) == (
        None,
        "engine/model.plan: it runs on a GPU, and its graph ran on the CPU",
    )
    assert [gate.name for gate in graph_gates(info, "cuda", few)] == [GATE]


def test_the_rows_that_run():
    """Short ones, of all lengths; a reranker's, of all scores; longer ones are cut."""
    generator = np.random.default_rng(0)

    def model(ids, mask):
        return ids.sum(axis=1).astype(np.float32)

    def few_of(lengths, results) -> Few:
        rows = [generator.integers(0, 9, length) for length in lengths]
        return run_few(model, rows, results)

    lengths = [*range(300, 0, -10)]
    found = few_of(lengths, np.zeros((30, 4), np.float32))
    assert [*map(len, found.rows)] == [10, 60, 110, 160]
    assert found.results.tolist() == [row.sum() for row in found.rows]
    scores = np.linspace(0, 1, 30, dtype=np.float32)
    assert [*map(len, few_of(lengths, scores).rows)] == [160, 110, 60, 10]
    assert [*map(len, few_of([500, 400, 900], scores[:3]).rows)] == [160] * 3
    assert [*map(len, few_of([7], scores[:1]).rows)] == [7]
