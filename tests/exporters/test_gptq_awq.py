"""GPTQ and AWQ on whole models: closer than rounding, the same after an interruption."""

import re
import weakref

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.tensor_files import SINGLE
from embedport.checkpoint.weights import Weights
from embedport.errors import CheckpointError, InputError
from embedport.exporters.calibration import engines, gptq_awq
from embedport.exporters.calibration.gptq_awq import kept_layers, quantize_layers, scale_layers
from embedport.exporters.calibration.layerwise import STAGES, Layer, Segment, embed_rows
from embedport.exporters.graph.ort_dialect import OrtDialect
from embedport.exporters.graph.precision import PRECISIONS
from embedport.exporters.graph.qwen3 import Design
from embedport.exporters.texts import FEW
from embedport.quantize import gptq
from embedport.quantize.formats import Format, plan_formats
from embedport.texts.samples import builtin_samples
from tests.synthetic import plant_outliers

TEXTS = [sample.text for sample in builtin_samples()]
ROWS = [np.random.default_rng(i).integers(0, 1000, 30) for i in range(4)]


def shared_inputs(weights, folder):
    """For each input that projections of layer 0 share: (their names, each text's [tokens, in])."""
    design = Design(weights, OrtDialect(), PRECISIONS["fp32"])
    states, inputs, stages = embed_rows(weights, ROWS), [], []
    for stage in range(STAGES):
        with Segment(design, 0, folder, stage) as segment:
            inputs = segment.run(ROWS, states, inputs)
            stages.append((segment.names, list(inputs)))
    return stages


@pytest.mark.parametrize("task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)])
def test_gptq_is_closer_than_rounding(artifacts, task):
    pairs = [(a, b) for a, b in zip(TEXTS[:16], TEXTS[16:32], strict=True)]

    def outputs(**options):
        runtime = artifacts("kv1", task, **options)
        return runtime.encode(TEXTS) if task == "embedding" else runtime.score(pairs)

    def error(algorithm):
        options = {"precision": "int4", "group_size": 32, "embedding_bits": 8}
        return ((outputs(algorithm=algorithm, **options) - outputs()) ** 2).mean()

    assert error("gptq") < 0.75 * error("rtn")


def test_calibration_does_not_round_activations(checkpoints, tmp_path):
    """Formats that round them are calibrated like those that do not."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv2")))
    formats = plan_formats(weights.spec, "int8", dialect="standard")
    rounded, plain = (
        quantize_layers(weights, weights, each, ROWS, tmp_path / name, lambda: None)
        for name, each in (
            ("rounded", formats),
            ("plain", {name: Format(format.scheme) for name, format in formats.items()}),
        )
    )
    for name in formats:
        np.testing.assert_array_equal(rounded(name).codes, plain(name).codes)


def test_awq_on_outliers(checkpoints, copied, tmp_path):
    """Channels that the inputs make large lose less than under plain rounding."""
    folder = copied(checkpoints("kv8"))
    plant_outliers(folder, magnitude=30)

    def vectors(name, **options):
        embedder = embedport.load(embedport.export(folder, tmp_path / name, **options).folder)
        assert isinstance(embedder, embedport.Embedder)
        return embedder.encode(TEXTS)

    options = {"precision": "int4", "embedding_bits": 8}
    fp32 = vectors("fp32")
    errors = [
        ((vectors(name, algorithm=name, **options) - fp32) ** 2).mean() for name in ("mse", "awq")
    ]
    assert errors[1] < 0.9 * errors[0]


def test_awq_counts_an_error_by_what_it_is_multiplied_with(checkpoints, tmp_path):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats["embed_tokens"]
    folded, importance = scale_layers(
        weights, weights, formats, ROWS, tmp_path / "layers", lambda: None
    )
    for names, inputs in shared_inputs(folded, tmp_path):
        squares = np.square(np.concatenate(inputs)).mean(axis=0)
        for name in names:
            np.testing.assert_allclose(importance(name), squares, rtol=1e-3)


def test_awq_takes_tokens_from_all_places():
    """Not every text's first, which is the same for all that begin alike."""

    texts = [np.arange(40, dtype=np.float32)[:, None]] * 600
    found = gptq_awq._sample(texts)
    places, counts = np.unique(found, return_counts=True)
    assert len(found) == -(-600 * 40 // (600 * 40 // gptq_awq.SAMPLE))
    assert len(places) >= 20
    assert counts.max() < 2 * counts.mean()


def test_the_manifest_says_what_it_was_calibrated_on(artifacts):
    options = {"precision": "int4", "group_size": 32, "embedding_bits": 8, "algorithm": "gptq"}
    recipe = artifacts("kv1", **options).artifact.manifest.recipe
    assert recipe["algorithm"] == "gptq"
    assert recipe["calibration"]["source"] == "built-in"
    assert recipe["calibration"]["texts"] == FEW
    assert len(recipe["calibration"]["sha256"]) == 64


def test_a_recipe_is_replayed_on_the_same_texts_only(checkpoints, short, tmp_path):
    texts = short.file("embedding", tmp_path)
    first = embedport.export(
        checkpoints("kv1"),
        tmp_path / "first",
        precision="int4",
        group_size=32,
        algorithm="gptq",
        calibration=texts,
    )
    assert {path.name for path in tmp_path.iterdir()} == {texts.name, "first"}  # no layers
    recipe = first.folder / "embedport.json"
    with pytest.raises(
        InputError, match=r"on texts from calibration\.jsonl, and those from built-in give other"
    ):
        embedport.export(checkpoints("kv1"), tmp_path / "other", recipe=recipe)
    assert not (tmp_path / "other").exists()
    again = embedport.export(
        checkpoints("kv1"), tmp_path / "again", recipe=recipe, calibration=texts
    )
    data = [each.graph.with_name("model.onnx_data").read_bytes() for each in (first, again)]
    assert data[0] == data[1]
    assert again.manifest.recipe == first.manifest.recipe


@pytest.mark.parametrize("algorithm", ["gptq", "awq"])
@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("embed_tokens", "embed_tokens gives"),
        ("layers.1.input_layernorm", r"layers\.1\.self_attn\.q_proj"),
    ],
)
def test_activations_that_are_not_finite(checkpoints, copied, tmp_path, algorithm, tensor, place):
    folder = copied(checkpoints("kv1"))
    tensors = load_file(folder / SINGLE)
    tensors[f"{tensor}.weight"][...] = np.nan
    save_file(tensors, folder / SINGLE)
    with pytest.raises(CheckpointError, match=f"{re.escape(str(folder))}: {place}"):
        embedport.export(folder, tmp_path / "out", precision="int4", algorithm=algorithm)


def test_a_layer_is_closed(checkpoints, tmp_path):
    """The variable of `with` outlives the block; the layer's weights do not."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    with Layer(Design(weights, OrtDialect(), PRECISIONS["fp32"]), 0, tmp_path) as layer:
        session = weakref.ref(layer.session)
        assert session() is not None
    assert session() is None
    assert list(tmp_path.iterdir()) == []


def test_smoothquant_measures_activations(checkpoints, tmp_path):
    """SmoothQuant, arXiv:2211.10438, eq. 4 at alpha 0.5: factors of a geometric mean of 1."""
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int8", dialect="standard")
    folder = tmp_path / "layers"
    folded, _ = scale_layers(
        weights, weights, formats, ROWS, folder, lambda: None, scaling="smoothquant"
    )
    names, inputs = shared_inputs(weights, tmp_path)[2]
    largest = np.max([np.abs(text).max(axis=0) for text in inputs], axis=0)
    reading = np.max(
        [np.abs(weights.read_fp32(f"{name}.weight")).max(axis=0) for name in names], axis=0
    )
    expected = np.sqrt(largest / reading)
    expected /= np.exp(np.log(expected).mean())
    gains = "layers.0.post_attention_layernorm.weight"
    found = weights.read_fp32(gains) / folded.read_fp32(gains)
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_awq_opens_each_segment_once(checkpoints, tmp_path, monkeypatch):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats["embed_tokens"]
    opened = []

    class Counted(Segment):
        def __init__(self, design, layer, folder, stage):
            opened.append((layer, stage))
            super().__init__(design, layer, folder, stage)

    monkeypatch.setattr(engines, "Segment", Counted)
    scale_layers(weights, weights, formats, ROWS, tmp_path / "layers", lambda: None)
    assert opened == [(layer, stage) for layer in range(3) for stage in range(STAGES + 1)]


def test_finished_layers_are_one_runs_alone(checkpoints, tmp_path):
    """Two runs with different requests would delete each other's."""
    source, out = checkpoints("kv8"), tmp_path / "out"
    with kept_layers(out, used=True) as folder:
        layer = folder / "layer-000.safetensors"
        layer.write_bytes(b"of the run that holds the folder")
        with pytest.raises(InputError, match=r"\.out\.layers is locked by another run"):
            embedport.export(source, out, precision="int4", algorithm="gptq")
        with pytest.raises(InputError, match=r"\.out\.layers is locked by another run"):
            embedport.quantize_checkpoint(source, out, method="gptq")
        embedport.export(source, out)
        assert layer.is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_run_says_what_it_keeps(tmp_path, caplog):
    def interrupt(*files):
        with kept_layers(tmp_path / "out", used=True) as folder:
            (folder / "codes").mkdir()
            for name in ("request.txt", *files):
                (folder / "codes" / name).write_text("")
            raise KeyboardInterrupt

    folder = tmp_path / ".out.layers"
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    assert not folder.exists()
    assert caplog.messages == []
    with pytest.raises(KeyboardInterrupt):
        interrupt("layer-000.safetensors")
    assert (folder / "codes" / "layer-000.safetensors").exists()
    (message,) = caplog.messages
    assert message.startswith(f"{folder} keeps the layers that are finished")


def test_what_an_earlier_run_left_goes_with_the_next(checkpoints, tmp_path):
    folder = tmp_path / ".out.layers"
    folder.mkdir()
    (folder / "layer-000.safetensors").write_bytes(bytes(8))
    embedport.export(checkpoints("kv2"), tmp_path / "out")
    assert not folder.exists()


def test_only_what_a_run_goes_on_from_is_kept(tmp_path):
    def left():
        """Files that a killed run may leave; returns those left once the next run has prepared."""
        for name in ("layer-000", "layer-001", "states-000", "states-001"):
            (tmp_path / f"{name}.safetensors").write_bytes(b"")
        (tmp_path / "layer-002.partial").write_bytes(b"")
        (tmp_path / "tmpx").mkdir()
        (tmp_path / "tmpx" / "part.onnx_data").write_bytes(b"")
        gptq_awq._prepare(tmp_path, "a request")
        assert (tmp_path / gptq_awq.REQUEST).read_text() == "a request"
        return {path.name for path in tmp_path.iterdir()} - {gptq_awq.REQUEST}

    assert left() == set()
    resumed = {"layer-000.safetensors", "layer-001.safetensors", "states-001.safetensors"}
    assert left() == resumed
    for damaged in (b"", b"a requ", b"\xff"):
        (tmp_path / gptq_awq.REQUEST).write_bytes(damaged)
        assert left() == set()


def test_another_version_begins_anew(checkpoints, monkeypatch):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    before = gptq_awq._request(weights, weights, {}, ROWS)
    assert gptq_awq._request(weights, weights, {}, ROWS) == before
    monkeypatch.setattr(gptq_awq, "__version__", "99")
    assert gptq_awq._request(weights, weights, {}, ROWS) != before


def test_an_interrupted_run_goes_on(checkpoints, tmp_path, monkeypatch):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv1")))
    formats = plan_formats(weights.spec, "int4", dialect="ort")
    del formats["embed_tokens"]
    quantized = []
    real = gptq.quantize_gptq

    def counted(*arguments):
        quantized.append(1)
        return real(*arguments)

    monkeypatch.setattr(gptq, "quantize_gptq", counted)

    def run(folder, layers=None):
        done = iter(range(layers or 99))

        def advance():
            if next(done) + 1 == layers:
                raise KeyboardInterrupt

        return quantize_layers(weights, weights, formats, ROWS, folder, advance)

    whole = run(tmp_path / "whole")
    assert len(quantized) == 3 * 7
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", layers=2)
    quantized.clear()
    resumed = run(tmp_path / "parts")
    assert len(quantized) == 7
    for name in formats:
        np.testing.assert_array_equal(resumed(name).codes, whole(name).codes)
    # Other texts are another request: nothing is taken over.
    quantized.clear()
    quantize_layers(weights, weights, formats, ROWS[:2], tmp_path / "parts", lambda: None)
    assert len(quantized) == 3 * 7
