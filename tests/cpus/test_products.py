"""8-bit products are exact on this CPU, and nothing is written that would not be on another.

The same products run on other CPUs by `make test-cpus`.
"""

import logging
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

import embedport
from embedport.errors import VerificationError
from embedport.quantize.formats import Format
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from embedport.runtimes.exact import NO_KLEIDIAI, make_exact, saturates

HERE = Path(__file__).parent
PRODUCTS = runpy.run_path(str(HERE / "products.py"))
ARTIFACTS = runpy.run_path(str(HERE / "artifacts.py"))
CHECK = runpy.run_path(str(HERE / "check_products.py"))
largest_difference = CHECK["largest_difference"]
TEXTS = ["one text", "and another, somewhat longer", ""]


@pytest.mark.parametrize("kernels", [False, True])
def test_worst_case_codes_are_multiplied_exactly(kernels):
    differences = {
        case.name: largest_difference(case.graph, case.x, case.expected, kernels=kernels)
        for case in PRODUCTS["cases"]()
    }
    assert len(differences) >= 18
    assert {name: each for name, each in differences.items() if each} == {}


def test_worst_case_codes_in_openvino():
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    products = [
        case
        for case in PRODUCTS["cases"]()
        if case.name.startswith("int8 ") and case.name.endswith("standard fp32")
    ]
    differences = [CHECK["in_openvino"](case.graph, case.x, case.expected) for case in products]
    assert differences == [0, 0]


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_codes_that_saturate_are_not_written(dialect):
    plain = QuantScheme(8, None, symmetric=True)
    matrix = PRODUCTS["matrix_of"](quantize_rtn(np.ones((2, 6), np.float32), plain))
    with pytest.raises(VerificationError, match=r"matrix: the codes of inputs 0 and 1 .* 127 and"):
        matrix.codes_transposed().numpy()


def test_every_format_with_8_bit_activations_limits_pairs():
    assert Format.parse("int8").scheme.limits_pairs
    for text in ("fp8", "int8/128", "int8/32s", "int4/64"):
        assert not Format.parse(text).scheme.limits_pairs


@pytest.mark.parametrize(
    ("form", "entries"), [("int4/64s", {NO_KLEIDIAI: "1"}), ("int4/64", {}), ("int8/128s", {})]
)
def test_kleidiai_multiplies_no_symmetric_4_bits(form, entries):
    """Which is seen on ARM alone: it rounds a token's activations by one scale."""
    graph, recipe = SimpleNamespace(limits_pairs=True), {"formats": {"matrix": form}}
    artifact: Any = SimpleNamespace(manifest=SimpleNamespace(graph=graph, recipe=recipe))
    found: dict[str, str] = {}
    make_exact(SimpleNamespace(add_session_config_entry=found.__setitem__), artifact)
    assert found == entries


@pytest.fixture(scope="module")
def unlimited(checkpoints, tmp_path_factory):
    """A function (dialect) -> the folder of an artifact as embedport made it at first."""

    def make(dialect):
        output = tmp_path_factory.mktemp("unlimited") / dialect
        ARTIFACTS["write_unlimited"](checkpoints("kv8"), output, dialect=dialect)
        return output

    return make


@pytest.mark.parametrize("dialect", ["ort", "standard"])
def test_an_earlier_artifact_where_it_would_saturate(unlimited, dialect, monkeypatch, caplog):
    """The other way of multiplying is exact too: nothing changes but fp32's last bits."""
    folder = unlimited(dialect)

    def encode(*, saturating):
        monkeypatch.setattr("embedport.runtimes.exact.saturates", lambda: saturating)
        with caplog.at_level(logging.WARNING, "embedport"):
            model = embedport.load(folder, device="cpu")
        assert isinstance(model, embedport.Embedder)
        return model.encode(TEXTS)

    found = encode(saturating=True)
    assert "Export it again" in caplog.text
    assert str(folder) in caplog.text
    if not saturates():
        caplog.clear()
        np.testing.assert_allclose(found, encode(saturating=False), atol=1e-3)
        assert not caplog.text


def test_an_artifact_of_now_says_that_it_is_exact(checkpoints, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("embedport.runtimes.exact.saturates", lambda: pytest.fail("not needed"))
    artifact = embedport.export(checkpoints("kv2"), tmp_path / "a", precision="int8")
    assert artifact.manifest.graph is not None
    assert artifact.manifest.graph.limits_pairs
    with caplog.at_level(logging.WARNING, "embedport"):
        embedport.load(artifact.folder, device="cpu")
    assert not caplog.text


def test_saturation_is_found_by_a_product(monkeypatch):
    """An onnxruntime whose products saturate at 16 bits."""

    class Saturating:
        def __init__(self, *arguments, **options):
            pass

        def run(self, names, feeds):
            x = feeds["x"]
            pairs = np.clip(127 * (x[:, ::2].astype(int) + x[:, 1::2]), -32768, 32767)
            return [np.repeat(pairs.sum(axis=1, keepdims=True), 16, axis=1)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Saturating)
    assert saturates.__wrapped__()
