"""The whole embedding table is compared: a wrong row of a token that no validated text holds fails.

Each damaged artifact gets a manifest with the right hashes, as a wrong exporter would write.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.artifact.folder import Artifact, write_manifest
from embedport.artifact.segments import EMBEDDING, segments
from embedport.checkpoint.tokenizer import load_tokenizer
from embedport.errors import ArtifactError
from embedport.requirements import meets
from embedport.runtimes import read_info
from embedport.texts.samples import Sample
from embedport.validation import table
from embedport.validation.opening import open_live
from embedport.validation.table import GATE, TableSketch, sketch_rows, table_gate

# Of tokens that TEXTS and PAIRS do not hold.
ROW, OTHER = 777, 900
VALIDATED = [np.arange(300, 320)]
TEXTS = [Sample("What is tea?", "query"), Sample("A leaf from China."), Sample("Snow is cold.")]
PAIRS = [("What is tea?", "A leaf."), ("What is tea?", "Snow is cold.")]


def exchange(values):
    values[[ROW, OTHER]] = values[[OTHER, ROW]]


def scale(factor):
    """A change of the floats: the scales of a quantized table, the values of another."""

    def change(values):
        if values.dtype == np.float32:
            values[ROW] *= factor

    return change


CHANGES: dict[str, tuple[Callable[[np.ndarray], None], list[int]]] = {
    "exchanged": (exchange, [ROW, OTHER]),
    "zeroed": (scale(0), [ROW]),
    "doubled": (scale(2), [ROW]),
    "negated": (scale(-1), [ROW]),
    "NaN": (scale(np.nan), [ROW]),
}
# The table is in a rotated basis.
ROTATED = ("embedding", "int8")
SLOW = [pytest.mark.slow]


def damage(folder, change):
    """Change an artifact's table, and write its manifest anew."""
    artifact = Artifact.open(folder)
    (part,) = (part for scope, part in segments(ir.load(artifact.graph)) if scope == EMBEDDING)
    for value in part.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        path, offset, length = artifact.graph.parent / tensor.location, tensor.offset, tensor.length
        data = np.memmap(path, np.uint8, "r+", offset or 0, length)
        kind = np.float32 if tensor.dtype == ir.DataType.FLOAT else np.uint8
        change(data.view(kind).reshape(artifact.manifest.vocab_size, -1))
        data.flush()
    write_manifest(folder, artifact.manifest, folder.name)


def gate_of(report):
    (found,) = [gate for gate in report.gates if gate.name == GATE]
    return found


def failed(report):
    return {gate.name for gate in report.gates if gate.failed}


@pytest.fixture(scope="module")
def sketches(checkpoints):
    """A function (task) -> the table of its checkpoint "kv2"."""
    return lambda task: open_live(checkpoints("kv2", task), task=task, device="cpu").table()


@pytest.mark.parametrize(
    ("task", "precision", "name"),
    [
        pytest.param(*case, name, marks=[] if case == ROTATED or name == "exchanged" else SLOW)
        for case in (
            ("embedding", "fp32"),
            ROTATED,
            ("embedding", "int4"),
            ("reranker", "int8"),  # the basis is not in its graph
        )
        for name in CHANGES
    ],
)
def test_a_wrong_row(folders, sketches, copied, task, precision, name):
    change, rows = CHANGES[name]
    folder = copied(folders(task, precision=precision).artifact)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    sound = table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED)
    assert (sound.value, sound.detail) == (0, "")
    damage(folder, change)
    gate = table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED)
    assert (gate.value, gate.failed) == (len(rows), True)
    words = "exchanged with another)" if name == "exchanged" else "off by about "
    for row in rows:
        assert f"{row} {tokenizer.decode([row])!r} ({words}" in gate.detail


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_wrong_row_of_openvino(folders, sketches, copied, task):
    """Its file has a table of its own."""
    if find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")
    folder = copied(folders(task, consumers=("openvino",)).artifact)
    manifest, tokenizer = Artifact.open(folder).manifest, load_tokenizer(folder / "tokenizer.json")
    place = folder / "openvino" / "openvino_model.xml"
    assert table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED).value == 0
    layer = place.read_text().split('name="embed_tokens.weight"')[1]
    offset = int(layer.split('offset="')[1].split('"')[0])
    rows, shape = place.with_suffix(".bin"), (manifest.vocab_size, manifest.hidden_size)
    values = np.memmap(rows, np.float32, "r+", offset, shape)
    exchange(values)
    values.flush()
    write_manifest(folder, manifest, folder.name)
    gate = table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED)
    assert gate.value == 2
    assert gate.detail.startswith(f"{ROW} ")
    place.write_text(place.read_text().replace('"embed_tokens/', '"table/'))
    write_manifest(folder, manifest, folder.name)
    with pytest.raises(ArtifactError, match="an operator embed_tokens/Gather should look up the"):
        table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED)


def test_most_rows_are_wrong(folders, sketches, copied):
    """As of an export that ended early; the texts' tokens are below."""
    folder = copied(folders("embedding").artifact)

    def cut(values):
        values[VALIDATED[0].max() + 1 :] = 0

    damage(folder, cut)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    gate = table_gate(read_info(folder), sketches("embedding"), tokenizer, VALIDATED)
    wrong = len(sketches("embedding").lengths) - VALIDATED[0].max() - 1
    assert gate.value == wrong
    assert gate.detail.endswith(f" and {wrong - 10:,} more")


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_no_text_shows_a_wrong_row(folders, copied, tmp_path, task):
    """Nothing else fails, with the checkpoint and with a recorded reference."""
    made = folders(task)
    folder, recorded = copied(made.artifact), tmp_path / "model.reference"
    inputs: dict[str, Any] = {"texts": TEXTS} if task == "embedding" else {"pairs": PAIRS}
    embedport.record_reference(made.checkpoint, recorded, task=task, device="cpu", **inputs)
    damage(folder, exchange)
    for reference, given in ((made.checkpoint, inputs), (recorded, {})):
        report = embedport.validate(folder, reference, device="cpu", record=False, **given)
        assert failed(report) == {GATE}
        assert report.next_steps == (
            "Make it again: rows of its embedding table are not those of the checkpoint.",
        )


def test_a_wrong_row_of_a_checkpoint(rounded, checkpoints, copied):
    """A checkpoint of another tool: its table is read as it is loaded, in a dtype of its own."""
    folder = copied(rounded("gptq"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    reference = open_live(checkpoints("kv8"), task="embedding", device="cpu").table()
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    for change, value in ((lambda values: None, 0), (exchange, 2)):
        values = tensors[name].astype(np.float16)
        change(values)
        save_file(tensors | {name: values}, file, metadata={"format": "pt"})
        assert table_gate(read_info(folder), reference, tokenizer, VALIDATED).value == value


@pytest.mark.parametrize(
    ("task", "name"), [("reranker", "continuation"), ("embedding", "model"), ("reranker", "model")]
)
def test_another_graph_with_another_table(folders, sketches, copied, task, name):
    """All graphs read the same weights; one that reads others is compared too."""
    folder = copied(folders(task, consumers=("older-onnxruntime",)).artifact)
    manifest = Artifact.open(folder).manifest
    path = folder / "onnx" / f"{name}.onnx"
    if name == "continuation" and not meets("onnxruntime>=1.32", onnxruntime.__version__):
        pytest.skip("onnxruntime before 1.32 runs no continuation graph")
    model = ir.load(path)
    (part,) = (part for scope, part in segments(model) if scope == EMBEDDING)
    (name,) = part.graph.initializers
    tensor = model.graph.initializers[name].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    values = tensor.numpy().copy()
    exchange(values)
    model.graph.initializers[name].const_value = ir.tensor(values, name=name)
    ir.save(model, path)
    write_manifest(folder, manifest, folder.name)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    assert table_gate(read_info(folder), sketches(task), tokenizer, VALIDATED).value == 2


def test_a_table_with_too_few_rows(folders, sketches, copied):
    folder = copied(folders("embedding").artifact)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    sketch = sketches("embedding")
    longer = TableSketch(
        sketch.directions,
        np.concatenate([sketch.products, sketch.products[:5]]),
        np.concatenate([sketch.lengths, sketch.lengths[:5]]),
    )
    with pytest.raises(ArtifactError, match=r"has no rows for the tokens 0 to 1,\d\d\d"):
        table_gate(read_info(folder), longer, tokenizer, VALIDATED)


def test_an_unknown_basis_is_not_checked(folders, sketches, copied):
    """As other tools write it, or an embedport that turned tables in another way."""
    folder = copied(folders("reranker", precision="int8").artifact)
    artifact = Artifact.open(folder)
    recipe = {**(artifact.manifest.recipe or {}), "seed": 7}
    write_manifest(folder, replace(artifact.manifest, recipe=recipe), folder.name)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    gate = table_gate(read_info(folder), sketches("reranker"), tokenizer, VALIDATED)
    assert (gate.value, gate.passed) == (None, None)
    assert gate.basis == (
        "not checked: the table is in another basis, the rows of the texts' tokens too"
    )


def test_a_graph_without_a_part_for_its_table_is_not_checked(folders, sketches, monkeypatch):
    folder = folders("embedding").artifact
    monkeypatch.setattr(table, "EMBEDDING", "another_name")
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    gate = table_gate(read_info(folder), sketches("embedding"), tokenizer, VALIDATED)
    assert (gate.value, gate.passed) == (None, None)
    assert gate.basis == "not checked: a graph has no part of its own named another_name"


def hard_rows(count, width):
    """Rows as of trained tables: outlier channels, all lengths, zeros, one value, tiny values."""
    generator = np.random.default_rng(0)
    rows = generator.standard_t(3, (count, width)).astype(np.float32)
    rows *= np.exp(0.5 * generator.standard_normal((count, 1))).astype(np.float32) / 30
    rows[:, generator.choice(width, 6, replace=False)] *= 30
    rows[:8] *= np.array([[0], [1e-6], [1e-20], [1e-38], [0], [0], [1], [1]], np.float32)
    rows[4, 5], rows[5], rows[6, 1:] = 1, 0.5, 0
    return rows


@pytest.mark.parametrize("form", ["int8/128s", "int4/128", "int4/64", "int4/64s", "fp16", "bf16"])
def test_rounding_alone_never_fails(form):
    """And a wrong row among them is found."""
    import ml_dtypes

    from embedport.quantize.formats import Format
    from embedport.quantize.rtn import quantize_rtn

    values = hard_rows(3000, 256)
    sketch = sketch_rows(values.__getitem__, 3000, 256)
    if form in ("fp16", "bf16"):
        dtype = np.float16 if form == "fp16" else ml_dtypes.bfloat16
        stored, limit = values.astype(dtype).astype(np.float32), table.FLOAT_LIMIT
    else:
        stored = quantize_rtn(values, Format.parse(form).scheme).dequantize()
        limit = table.LIMITS[form[:4]]
    for wrong in ([], [500, 600]):
        stored[wrong] = stored[wrong[::-1]]
        errors = table._errors(stored.__getitem__, sketch, sketch.directions)
        assert np.flatnonzero(~(errors <= limit)).tolist() == wrong


def test_a_row_of_nan():
    """A checkpoint's own, of a token that nobody uses, is no difference; another one is."""
    values = hard_rows(64, 32)
    values[40] = np.nan
    sketch, found = sketch_rows(values.__getitem__, 64, 32), values.copy()
    for wrong in ([], [41]):
        found[wrong] = np.nan
        errors = table._errors(found.__getitem__, sketch, sketch.directions)
        assert np.flatnonzero(~(errors <= table.FLOAT_LIMIT)).tolist() == wrong


@pytest.mark.parametrize("form", ["int8/128s", "int4/128", "int4/64", "int4/64s"])
@pytest.mark.parametrize("distance", [0.3, 0.45])
def test_rows_that_are_close_are_exchanged(form, distance):
    """As those of words that are alike: within the limit of 4 bits."""
    from embedport.quantize.formats import Format
    from embedport.quantize.rtn import quantize_rtn

    values, generator = hard_rows(3000, 256), np.random.default_rng(1)
    pairs = {300: 301, 500: 600, 700: 701}
    for first, second in pairs.items():
        step = generator.standard_normal(256, np.float32) * np.abs(values[first]).clip(0.01, 0.1)
        step *= distance * np.linalg.norm(values[first]) / np.linalg.norm(step)
        values[second] = values[first] + step
    sketch = sketch_rows(values.__getitem__, 3000, 256)
    stored = quantize_rtn(values, Format.parse(form).scheme).dequantize()
    errors = table._errors(stored.__getitem__, sketch, sketch.directions)
    assert (errors < table.LIMITS[form[:4]]).all()
    stored[[500, 600]] = stored[[600, 500]]
    errors = table._errors(stored.__getitem__, sketch, sketch.directions)
    assert np.flatnonzero(~(errors <= table.LIMITS[form[:4]])).tolist() == [500, 600]
