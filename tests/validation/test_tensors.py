"""Tensors that no rounding changes: a norm, a bias or a Dense module of another model fails."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.artifact.folder import Artifact, write_manifest
from embedport.artifact.layout import write_json
from embedport.checkpoint.spec import ModelSpec
from embedport.runtimes import read_info
from embedport.validation.tensors import GATE, read_tensors, tensors_gate

WIDTH, DENSE = 48, "2_Dense/model.safetensors"
FAST = {"fast": True}


def gate_of(folder, checkpoint, **options):
    return tensors_gate(
        read_info(folder), read_tensors(ModelSpec.from_checkpoint(checkpoint, **options))
    )


def edit(name, change):
    """A change of one tensor in a file."""

    def apply(path):
        tensors = load_file(path)
        tensors[name] = np.ascontiguousarray(change(tensors[name]))
        save_file(tensors, path, metadata={"format": "pt"})

    return apply


@pytest.fixture(scope="module")
def dense(checkpoints, tmp_path_factory):
    """(an embedder with a Dense module, its artifact, whose graph holds the module too)."""
    base = tmp_path_factory.mktemp("dense")
    folder = Path(shutil.copytree(checkpoints("kv2"), base / "checkpoint"))
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    paths = ("", "1_Pooling", "2_Dense", "3_Normalize")
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    module = {"in_features": 64, "out_features": WIDTH, "bias": True}
    write_json(folder / "2_Dense" / "config.json", module)
    generator = np.random.default_rng(0)
    tensors = {
        "linear.weight": generator.standard_normal((WIDTH, 64), np.float32),
        "linear.bias": generator.standard_normal(WIDTH, np.float32),
    }
    save_file(tensors, folder / "2_Dense" / "model.safetensors", metadata={"format": "pt"})
    embedport.export(folder, base / "artifact")
    return folder, base / "artifact"


SOUND: list[dict[str, Any]] = [
    {"precision": "int4"},
    {"precision": "int8"},
    {"precision": "fp16"},
    {"precision": "int8", "dialect": "standard"},
    {"consumers": ("sentence-transformers", "older-onnxruntime")},
]


@pytest.mark.parametrize("options", SOUND, ids=str)
def test_a_sound_graph(folders, options):
    model = folders("embedding", **options)
    gate = gate_of(model.artifact, model.checkpoint)
    assert (gate.value, gate.detail) == (0, "")


@pytest.mark.parametrize(
    ("method", "options"),
    [*((method, {}) for method in ("gptq", "awq", "bnb-int8", "w8a8", "fp8")), ("w8a8", FAST)],
)
def test_a_sound_checkpoint(checkpoints, quantized, method, options):
    """Also where the recipe scales channels: of these, factors are in the norms."""
    assert gate_of(quantized(method, **options), checkpoints("kv8")).value == 0


def test_a_graph_of_a_quantized_checkpoint(checkpoints, quantized, tmp_path):
    embedport.export(quantized("awq"), tmp_path / "stored")
    assert gate_of(tmp_path / "stored", checkpoints("kv8")).value is None


NORMS = [
    ("layers.1.self_attn.q_norm.weight", np.ones_like, "gptq"),
    ("layers.0.self_attn.k_norm.weight", lambda gains: gains[::-1], "awq"),
    ("layers.0.input_layernorm.weight", lambda gains: gains * 1.02, "gptq"),
    ("norm.weight", lambda gains: gains * np.r_[-1, gains[1:] ** 0].astype(gains.dtype), "w8a8"),
]


@pytest.mark.parametrize(("name", "change", "method"), NORMS)
def test_another_norm_of_a_quantized_checkpoint(
    checkpoints, quantized, changed, name, change, method
):
    """In 4 bits a small model's results are within the limits all the same."""
    folder = changed(quantized(method), edit(name, change), "model.safetensors")
    gate = gate_of(folder, checkpoints("kv8"))
    assert (gate.name, gate.value, gate.failed) == (GATE, 1, True)
    assert gate.detail.startswith(f"the weights: {name}: it is off by ")


@pytest.mark.parametrize(("kept", "words"), [(True, "it is off by "), (False, "it is missing")])
def test_another_norm_of_a_graph(folders, changed, kept, words):
    model, name = folders("embedding", precision="int4"), "layers.1.self_attn.k_norm.weight"

    def without_gains(path):
        graph = ir.load(path)
        value = graph.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(np.ones_like(value.const_value.numpy()), name=name)
        value.name = name if kept else "ones"
        ir.save(graph, path)

    folder = changed(model.artifact, without_gains, "onnx/model.onnx")
    gate = gate_of(folder, model.checkpoint)
    assert (gate.value, gate.failed) == (1, True)
    assert gate.detail.startswith(f"onnx/model.onnx: {name}: {words}")


def test_another_tool_may_fold_factors_into_norms(checkpoints, rounded, copied):
    folder = copied(rounded("gptq"))
    edit("layers.0.input_layernorm.weight", lambda gains: 2 * gains)(folder / "model.safetensors")
    gate = gate_of(folder, checkpoints("kv8"))
    assert (gate.value, gate.basis[:25]) == (None, "not checked: another tool")


@pytest.mark.parametrize("form", ["causal-lm", "sequence-classification"])
def test_another_head_of_a_quantized_reranker(checkpoints, quantized, copied, form):
    """No row of the embedding table is another, where the head is not tied to it."""
    checkpoint = checkpoints("kv8", "reranker")
    folder = copied(quantized("gptq", "reranker", form=form))
    assert gate_of(folder, checkpoint).value == 0
    path, manifest = folder / "model.safetensors", Artifact.open(folder).manifest
    if form == "causal-lm":
        head = load_file(path)["model.embed_tokens.weight"]
        save_file(load_file(path) | {"lm_head.weight": head}, path, metadata={"format": "pt"})
        write_manifest(folder, manifest, folder.name)
        assert gate_of(folder, checkpoint).value == 0
    name = "lm_head.weight" if form == "causal-lm" else "score.weight"
    edit(name, lambda rows: np.roll(rows, 1, axis=1))(path)
    write_manifest(folder, manifest, folder.name)
    gate = gate_of(folder, checkpoint)
    assert gate.value == 1
    assert gate.detail.startswith("the weights: score.weight: it is off by ")


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_the_head_of_a_graph(folders, precision):
    model = folders("reranker", precision=precision)
    assert gate_of(model.artifact, model.checkpoint).value == 0


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_another_dense_module_beside_a_graph(dense, changed, name):
    """sentence-transformers reads it from the folder, where the graph has one of its own."""
    checkpoint, artifact = dense
    assert gate_of(artifact, checkpoint).value == 0
    change = edit(f"linear.{name}", lambda tensor: np.roll(tensor, 1, axis=0))
    folder = changed(artifact, change, DENSE)
    gate = gate_of(folder, checkpoint)
    assert (gate.value, gate.detail.startswith(f"2_Dense/{name}: it is off by ")) == (1, True)
    assert "2_Dense/bias: it has the shape [48], and the reference's [0]" in (
        tensors_gate(read_info(artifact), {}).detail
    )
    (folder / DENSE).unlink()
    write_manifest(folder, Artifact.open(artifact).manifest, folder.name)
    assert "2_Dense/model.safetensors is missing" in gate_of(folder, checkpoint).detail


def test_a_dense_module_beside_a_graph_of_a_quantized_checkpoint(dense):
    """Its norms may hold another tool's factors; the module is compared all the same."""
    checkpoint, artifact = dense
    info, tensors = read_info(artifact), read_tensors(ModelSpec.from_checkpoint(checkpoint))
    assert info.artifact is not None
    manifest = info.artifact.manifest
    source = replace(manifest.source, original=("--reference", "tea"))
    opened = replace(info.artifact, manifest=replace(manifest, source=source))
    info = replace(info, artifact=opened)
    others = {"norm.weight": 2 * tensors["norm.weight"]}
    assert tensors_gate(info, {**tensors, **others}).value == 0
    others["2_Dense/bias"] = 2 * tensors["2_Dense/bias"]
    assert tensors_gate(info, {**tensors, **others}).detail.startswith(
        "2_Dense/bias: it is off by "
    )


def test_nothing_else_fails(dense, changed, tmp_path):
    """With a recorded reference too; one of an earlier version does not know."""
    (checkpoint, artifact), recorded = dense, tmp_path / "model.reference"
    embedport.record_reference(checkpoint, recorded, ["tea"], device="cpu")
    folder = changed(artifact, edit("linear.weight", lambda tensor: -tensor), DENSE)
    report = embedport.validate(folder, recorded, device="cpu", record=False)
    (gate,) = [gate for gate in report.gates if gate.failed]
    assert (gate.name, gate.value) == (GATE, 1)
    assert report.next_steps == (
        "Make it again: tensors that no rounding changes are not those of the checkpoint.",
    )
    assert tensors_gate(read_info(folder), None).value is None
