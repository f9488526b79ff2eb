"""Memory that is full or limited: said in words, and counted within a container's limit."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

import embedport
from embedport.errors import ArtifactError, DeviceError, InputError
from embedport.runtimes import onnxruntime as adapter

# onnxruntime's own exceptions, and what they say.
STATE = import_module("onnxruntime.capi.onnxruntime_pybind11_state")
ARENA = (
    "[ONNXRuntimeError] : 6 : RUNTIME_EXCEPTION : Non-zero status code returned while running "
    "MatMul node. Name:'MatMul_92' Status Message: bfc_arena.cc:376 void* "
    "onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Failed to allocate memory for "
    "requested buffer of size 8388608000"
)
CUDA = (
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 2: out of memory ; GPU=0 ; hostname=x ; "
    "expr=cudaMalloc((void**)&p, size);"
)
CUBLAS = "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"
FULL = (STATE.RuntimeException(ARENA), STATE.Fail(CUDA), STATE.Fail(CUBLAS))
KERNEL = STATE.RuntimeException("[ONNXRuntimeError] : 6 : RotaryAttention: memory is full")
OTHER = STATE.Fail("[ONNXRuntimeError] : 1 : FAIL : Load model failed: invalid protobuf")


def failing(error):
    def fail(*arguments, **options):
        raise error

    return fail


@pytest.fixture(scope="module")
def artifact(exported):
    return exported()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("error", [*FULL, KERNEL], ids=["arena", "cuda", "cublas", "kernel"])
def test_a_batch_that_there_is_no_room_for(artifact, monkeypatch, error, device):
    embedder: Any = embedport.load(artifact.folder, device="cpu")
    embedder.model.device = device
    place, name = (embedder.model, "_session") if device == "cpu" else (adapter, "run_bound")
    fails = (lambda error: SimpleNamespace(run=failing(error))) if device == "cpu" else failing
    monkeypatch.setattr(place, name, fails(error))
    with pytest.raises(InputError, match=r"a batch of 1 x \d+ tokens does not fit .*batch_tokens"):
        embedder.encode(["a"])
    monkeypatch.setattr(place, name, fails(OTHER))
    with pytest.raises(STATE.Fail, match="invalid protobuf"):
        embedder.encode(["a"])


@pytest.mark.parametrize("error", FULL, ids=["arena", "cuda", "cublas"])
def test_a_graph_that_a_gpu_has_no_room_for(artifact, error):
    def create(error, device="cuda"):
        stand_in = SimpleNamespace(
            SessionOptions=lambda: SimpleNamespace(add_session_config_entry=lambda *entry: None),
            InferenceSession=failing(error),
            preload_dlls=lambda: None,
            __version__="1.32.0",
        )
        adapter._create_session(stand_in, artifact, device, None)

    with pytest.raises(DeviceError, match=r"model.onnx does not fit into the GPU's free memory"):
        create(error)
    for other in ((OTHER, "cuda"), (error, "cpu")):
        with pytest.raises(ArtifactError, match="does not take the graph"):
            create(*other)


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [
        ("max", 0, None),
        (8 << 30, 6 << 30, 5 << 30),  # 3 GiB of it are cached files
        (8 << 30, 12 << 30, 0),
    ],
)
def test_a_containers_memory_counts(tmp_path, monkeypatch, limit, used, left):
    monkeypatch.setattr(adapter, "CGROUP", tmp_path)
    monkeypatch.setattr(adapter, "_read_available", lambda: 64 << 30)
    assert adapter.available_memory() == 64 << 30
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(
        f"anon 5\nactive_file {1 << 30}\ninactive_file {2 << 30}\nunevictable 0\n"
    )
    assert adapter.available_memory() == (64 << 30 if left is None else left)
    monkeypatch.setattr(adapter, "_read_available", lambda: 1 << 30)
    assert adapter.available_memory() == min(1 << 30, (1 << 30) if left is None else left)
    monkeypatch.setattr(adapter, "_read_available", lambda: None)
    assert adapter.available_memory() == left
