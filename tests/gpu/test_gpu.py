"""A GPU's results against the same model's on the CPU.

docs/gpu.md says which of it has run, and where.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import embedport
from embedport.artifact.folder import write_manifest
from embedport.errors import ArtifactError, DeviceError
from embedport.exporters.tensorrt import obstacle
from embedport.integrity import cache_folder
from embedport.machine.gpu import call, current_device
from embedport.runtimes.buffers import Buffer
from embedport.texts.samples import builtin_pairs, builtin_samples

pytestmark = pytest.mark.gpu

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]
# On a CPU each result is rounded as the graph says; a GPU adds up in another order.
COSINE = {"fp16": 0.999, "bf16": 0.999, "fp8": 0.99, "int8": 0.999, "int4": 0.999}
SCORE = {"fp16": 0.005, "bf16": 0.005, "fp8": 0.02, "int8": 0.01, "int4": 0.01}


def results(model, task):
    if task == "embedding":
        return model.encode(TEXTS)
    return model.score(PAIRS)


def check(found, expected, precision):
    assert np.isfinite(found).all()
    if found.ndim == 2:
        assert (found * expected).sum(axis=1).min() >= COSINE[precision]
    else:
        assert np.abs(found - expected).max() <= SCORE[precision]


@pytest.fixture(scope="module")
def engines(tmp_path_factory, checkpoints):
    """A function (precision, task) -> the folder of an artifact with an engine, cached."""
    made = {}
    if reason := obstacle("tensorrt"):
        pytest.skip(reason)

    def make(precision, task):
        if (precision, task) not in made:
            folder = tmp_path_factory.mktemp("engine") / "artifact"
            embedport.export_tensorrt(
                checkpoints("blocks", task),
                folder,
                target="this-gpu",
                precision=precision,
            )
            made[precision, task] = folder
        return made[precision, task]

    return make


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("precision", COSINE)
def test_tensorrt(engines, precision, task):
    folder = engines(precision, task)
    expected = results(embedport.load(folder, device="cpu"), task)
    engine = embedport.load(folder)
    assert engine.device == "cuda"
    for _ in range(5):  # the last ones from CUDA graphs
        check(results(engine, task), expected, precision)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("precision", COSINE)
def test_tensorrt_for_rtx(tmp_path, monkeypatch, checkpoints, precision, task):
    """On a GPU that the library does not support, its own message is the result."""
    if reason := obstacle("tensorrt-rtx"):
        pytest.skip(reason)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "artifact"
    manifest = embedport.export_tensorrt(
        checkpoints("blocks", task), folder, target="rtx", precision=precision
    ).manifest
    assert manifest.engine is not None
    expected = results(embedport.load(folder, device="cpu"), task)
    capability = current_device().capability
    supported = capability in manifest.engine.capabilities
    # Without the check of our own, the library is asked.
    engine = replace(manifest.engine, capabilities=(capability,))
    write_manifest(folder, replace(manifest, engine=engine), folder.name)
    for _ in range(2):  # the second one with the kernels of the first
        try:
            model = embedport.load(folder)
        except ArtifactError as error:
            if supported:
                raise
            pytest.skip(str(error))
        for _ in range(5):
            check(results(model, task), expected, precision)
        assert len(list(cache_folder("tensorrt-rtx").iterdir())) == 1


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_onnxruntime(tmp_path, checkpoints, device, precision, task):
    if device == "tensorrt" and (reason := obstacle("tensorrt")):
        pytest.skip(reason)
    dialect = "ort" if device == "cuda" else "standard"
    folder = tmp_path / "artifact"
    embedport.export(checkpoints("kv8", task), folder, precision=precision, dialect=dialect)
    try:
        model = embedport.load(folder, device=device)
    except DeviceError as error:
        if "this onnxruntime has no" not in str(error):
            raise
        pytest.skip(str(error))
    expected = results(embedport.load(folder, device="cpu"), task)
    check(results(model, task), expected, precision)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("geometry", ["kv1", "kv2", "kv8"])
def test_torch(checkpoints, geometry, precision, task):
    pytest.importorskip("torch")
    name = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    expected = results(
        embedport.load(checkpoints(geometry, task, dtype="float32"), device="cpu"), task
    )
    model = embedport.load(checkpoints(geometry, task, dtype=name), device="cuda")
    for _ in range(4):  # the last ones from CUDA graphs
        check(results(model, task), expected, precision)
    adapter: Any = model.model
    assert adapter._layers._graphs


@pytest.mark.parametrize("method", ["gptq", "awq", "bnb-nf4", "w8a8"])
def test_torch_stays_packed(quantized, method):
    """Small batches, unpacked inside the product, and large ones: the CPU's vectors."""
    pytest.importorskip("torch")
    matrices = pytest.importorskip("embedport.runtimes.packed.matrices")
    folder = quantized(method)
    expected = results(embedport.load(folder, device="cpu"), "embedding")
    model = embedport.load(folder, device="cuda")
    assert isinstance(model, embedport.Embedder)
    adapter: Any = model.model
    kind = matrices.ScaledMatrix if method == "w8a8" else matrices.PackedMatrix
    assert isinstance(adapter._layers._layers[0].qkv, kind)
    for batch_tokens in (1, 1 << 14):
        for _ in range(3):  # the last ones from CUDA graphs
            found = model.encode(TEXTS, batch_tokens=batch_tokens)
            # compressed-tensors divides a token by its largest value / 127.5, our kernel by / 127.
            check(found, expected, "fp8" if method == "w8a8" else "bf16")


def test_torch_in_any_batch_and_thread(checkpoints):
    pytest.importorskip("torch")
    model = embedport.load(checkpoints("kv8", dtype="float16"), device="cuda")
    assert isinstance(model, embedport.Embedder)
    alone = model.encode(TEXTS, batch_tokens=1)
    many = model.encode(TEXTS * 50, batch_tokens=1 << 20)  # too large for a graph
    for i in range(50):
        check(many[i * len(TEXTS) : (i + 1) * len(TEXTS)], alone, "fp16")
    sizes = [64, 256, 1024, 4096] * 4
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda size: model.encode(TEXTS, batch_tokens=size), sizes):
            check(found, alone, "fp16")


def test_torch_long_texts(checkpoints):
    """Beyond 4,096 tokens a text attends by itself."""
    pytest.importorskip("torch")
    texts = ["word " * 5000, "a few words", "number " * 4500]
    reference = embedport.load(checkpoints("kv8", dtype="float32"), device="cpu")
    model = embedport.load(checkpoints("kv8", dtype="float16"), device="cuda")
    assert isinstance(reference, embedport.Embedder)
    assert isinstance(model, embedport.Embedder)
    expected = reference.encode(texts)
    check(model.encode(texts, batch_tokens=1 << 20), expected, "fp16")
    check(model.encode(texts, batch_tokens=1), expected, "fp16")


@pytest.mark.parametrize("algorithm", ["gptq", "awq+gptaq"])
def test_calibration(tmp_path, checkpoints, algorithm):
    """The same vectors as of matrices rounded on the CPU, as near as rounding lets them come."""
    pytest.importorskip("torch")
    vectors = [
        embedport.load_embedder(
            embedport.export(
                checkpoints("blocks"),
                tmp_path / device,
                precision="int4",
                algorithm=algorithm,
                device=device,
            ).folder,
            device="cpu",
        ).encode(TEXTS)
        for device in ("cpu", "cuda")
    ]
    assert (vectors[0] * vectors[1]).sum(axis=1).min() >= 0.98


def test_buffers():
    """Copies to the device and back, captured in a CUDA graph as an engine's batches are."""
    runtime = pytest.importorskip("cuda.bindings.runtime")
    buffer, shape, stream = Buffer(np.int64, 8), (2, 3), int(call("cudaStreamCreate"))
    graphs = []
    for copy in (buffer.upload, buffer.download):
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        call("cudaStreamBeginCapture", stream, mode)
        copy(shape, stream)
        graphs.append(call("cudaGraphInstantiate", call("cudaStreamEndCapture", stream), 0))
    values = np.arange(6).reshape(shape)
    buffer.host(shape)[:] = values
    for graph in graphs:
        call("cudaGraphLaunch", graph, stream)
        call("cudaStreamSynchronize", stream)
        if graph is graphs[0]:
            buffer.host(shape)[:] = 0
    np.testing.assert_array_equal(buffer.host(shape), values)
