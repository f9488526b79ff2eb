"""onnxruntime on a GPU, as far as a CPU can tell."""

import logging
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest

import embedport
from embedport.errors import DeviceError
from embedport.integrity import cache_folder
from embedport.runtimes.onnxruntime import _load_cuda, run_bound
from embedport.runtimes.providers import RECORD_NODES, engine_cache, fallen_back, list_providers


@pytest.fixture
def made(exported):
    """A function (precision, dialect, task) -> artifact, cached."""

    def make(precision="fp32", dialect="standard", task="embedding"):
        return exported("blocks", task, precision=precision, dialect=dialect)

    return make


def test_what_is_asked_for(made):
    assert list_providers("cpu", made()) == [("CPUExecutionProvider", {})]
    (cuda, options), cpu = list_providers("cuda", made())
    assert (cuda, options["use_tf32"]) == ("CUDAExecutionProvider", "0")
    assert cpu == ("CPUExecutionProvider", {})
    names = [name for name, _ in list_providers("tensorrt", made())]
    assert names == ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


def test_libraries_are_looked_for_in_silence(capsys, caplog):
    caplog.set_level(logging.DEBUG)
    _load_cuda(SimpleNamespace(preload_dlls=lambda: print("Failed to load libcublas.so.13")))  # noqa: T201
    assert capsys.readouterr().out == ""
    assert "libcublas.so.13" in caplog.text


@pytest.mark.parametrize(
    ("precision", "flag"),
    [("fp32", None), ("fp16", "trt_fp16_enable"), ("bf16", "trt_bf16_enable")],
)
def test_tensorrt_computes_in_the_graphs_types(made, precision, flag):
    _, options = list_providers("tensorrt", made(precision))[0]
    assert [name for name in options if name.endswith("16_enable")] == ([flag] if flag else [])


def test_engines_are_kept_by_graph_and_weights(made):
    folders = {
        engine_cache(made(*each))
        for each in (("fp32",), ("fp16",), ("fp32", "standard", "reranker"))
    }
    assert len(folders) == 3
    assert all(folder.parent == cache_folder("engines") for folder in folders)
    assert all(folder.is_dir() for folder in folders)
    assert engine_cache(made()) == engine_cache(made())
    _, options = list_providers("tensorrt", made())[0]
    assert options["trt_engine_cache_path"] == str(engine_cache(made()))


def test_run_bound(made):
    session = onnxruntime.InferenceSession(made().graph)
    ids = np.arange(12).reshape(2, 6)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    expected = session.run(None, feeds)[0]
    found = run_bound(session, "sentence_embedding", feeds, "cpu")
    np.testing.assert_array_equal(found, expected)


def test_what_fell_back(made):
    """On a CPU everything does but the positions: the names are those of the graph."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(RECORD_NODES, "1")
    graph = made("int8", "ort").graph
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    fell = fallen_back(session)
    assert sum("MatMulIntegerToFloat" in each for each in fell) == 2 * 7
    assert not any(each.startswith("inputs/") or "(Reshape)" in each for each in fell)


SESSION = onnxruntime.InferenceSession


class Session:
    """A session on CUDA, some of whose nodes are not."""

    def __init__(self, graph, options, providers, **others):
        self.providers = [name for name, _ in providers]
        self.session = SESSION(graph, options, providers=["CPUExecutionProvider"], **others)

    def get_providers(self):
        return self.providers

    def get_inputs(self):
        return self.session.get_inputs()

    def get_outputs(self):
        return self.session.get_outputs()

    def get_provider_graph_assignment_info(self):
        nodes = [
            SimpleNamespace(name="layers.0/MatMulIntegerToFloat_7", op_type="MatMulIntegerToFloat"),
            SimpleNamespace(name="layers.1/Sub_7", op_type="Sub"),
        ]
        return [SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: nodes)]


@pytest.fixture
def with_cuda(made, monkeypatch):
    """Its folder, in an onnxruntime with CUDA; made without."""
    folder = made("int8", "ort").folder
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    return folder


def test_a_graph_that_cuda_has_no_kernels_for(with_cuda, caplog):
    with pytest.raises(
        DeviceError, match=r"layers.0/MatMulIntegerToFloat_7 .*would run on the CPU"
    ):
        embedport.load(with_cuda, device="cuda")
    with caplog.at_level(logging.WARNING):
        assert embedport.load(with_cuda, device="auto").device == "cpu"
    assert "CUDA has no kernels for layers.0/MatMulIntegerToFloat_7" in caplog.text
