"""The adapter on a GPU that is stood in for, with engines that are onnxruntime underneath."""

import sys

import numpy as np
import pytest

from embedport.artifact.folder import write_manifest
from embedport.cached import read_cached
from embedport.cli import main
from embedport.errors import ArtifactError, DeviceError, InputError, MissingPackageError
from embedport.machine.engine import LIBRARIES, EngineRecord, Profile
from embedport.runtimes import tensorrt as adapter
from embedport.texts.samples import builtin_pairs, builtin_samples

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PROFILES = ["1x1:1x8:2x512", "4x16:8x64:16x512"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_embedder(installed, graphs, load, library):
    artifact, trt = installed(library, profiles=PROFILES)
    embedder = load(artifact.folder, max_length=512)
    expected = load(graphs().folder, device="cpu", max_length=512)
    assert (embedder.device, embedder.model.precision) == ("cuda", "fp32")
    for batch_tokens in (64, 4096):
        vectors = embedder.encode(TEXTS, batch_tokens=batch_tokens)
        np.testing.assert_allclose(vectors, expected.encode(TEXTS), atol=1e-5)
    assert {profile for profile, _ in trt.shapes} == {0, 1}


def test_reranker(installed, graphs, load):
    artifact, _ = installed("tensorrt-rtx", "reranker", PROFILES)
    pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
    expected = load(graphs("reranker").folder, device="cpu", max_length=512).score(pairs)
    scores = load(artifact.folder, max_length=512).score(pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_shapes(installed, load):
    """Padded to a multiple of eight and to the profile's least; cut into parts beyond its most."""
    artifact, trt = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    ids = np.ones((1, 5), np.int64)
    for rows, tokens, shapes in [
        (1, 5, [(0, (1, 8))]),
        (3, 9, [(1, (4, 16))]),
        (35, 20, [(1, (16, 24)), (1, (16, 24)), (1, (4, 24))]),
        (1, 509, [(0, (1, 512))]),
    ]:
        trt.shapes.clear()
        batch = np.resize(ids, (rows, tokens))
        assert model(batch, np.ones_like(batch)).shape == (rows, 64)
        assert trt.shapes == shapes


def test_padding_on_the_left(installed, load):
    artifact, _ = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    ids = np.arange(10, 17)[None]
    left = np.pad(ids, ((0, 0), (4, 0)))
    expected = model(ids, np.ones_like(ids))
    np.testing.assert_allclose(model(left, (left > 0).astype(np.int64)), expected, atol=1e-6)


def test_repeated_shapes_become_graphs(installed, cuda, load):
    artifact, trt = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    generator = np.random.default_rng(0)
    for run in range(6):
        ids = generator.integers(5, 200, (2, 8))
        found = model(ids, np.ones_like(ids))
        again = trt.session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        np.testing.assert_allclose(found, again, atol=1e-6)
        assert cuda.launches == max(0, run + 1 - adapter.REPEATS)
    assert len(trt.contexts) == len(PROFILES) + 1
    other = np.ones((1, 24), np.int64)
    model(other, other)
    assert cuda.launches == 6 - adapter.REPEATS


def test_no_more_graphs_than_that(installed, cuda, monkeypatch, load):
    monkeypatch.setattr(adapter, "MAX_GRAPHS", 1)
    artifact, _ = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    for tokens in (8, 16):
        for _ in range(adapter.REPEATS + 2):
            ids = np.ones((1, tokens), np.int64)
            model(ids, ids)
    assert cuda.launches == 2


def test_what_cannot_be_captured_runs_all_the_same(installed, cuda, monkeypatch, caplog, load):
    artifact, _ = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    context = type(model._contexts[0])
    run = context.execute_async_v3
    monkeypatch.setattr(
        context, "execute_async_v3", lambda self, s: cuda._recording is None and run(self, s)
    )
    ids = np.full((1, 8), 11)
    results = [model(ids, np.ones_like(ids)) for _ in range(adapter.REPEATS + 2)]
    assert cuda.launches == 0
    assert "cannot capture 1 x 8 tokens" in caplog.text
    for each in results[1:]:
        np.testing.assert_array_equal(each, results[0])


def test_memory_is_given_back(installed, cuda, load):
    artifact, _ = installed(profiles=PROFILES)
    before = len(cuda._memory)
    embedder = load(artifact.folder)
    assert len(cuda._memory) == before + 7  # two inputs and the output twice, the scratch
    del embedder
    assert len(cuda._memory) == before


def test_streams_and_graphs_are_given_back(installed, cuda, monkeypatch, load):
    """A stream and one instantiated graph while the model is there, and nothing after it."""
    artifact, _ = installed(profiles=PROFILES)
    embedder = load(artifact.folder)
    context = type(embedder.model._contexts[0])
    run = context.execute_async_v3
    refused = np.ones((1, 16), np.int64)
    for ids in (np.ones((1, 8), np.int64), refused):
        if ids is refused:
            monkeypatch.setattr(
                context,
                "execute_async_v3",
                lambda self, s: cuda._recording is None and run(self, s),
            )
        for _ in range(adapter.REPEATS + 1):
            embedder.model(ids, ids)
    assert cuda.launches == 1
    assert len(cuda.handles) == 2
    del embedder
    assert cuda.handles == {}


def test_a_graph_that_cannot_be_instantiated_is_given_back(installed, cuda, monkeypatch, load):
    artifact, _ = installed(profiles=PROFILES)
    model = load(artifact.folder).model
    error = cuda.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(cuda, "cudaGraphInstantiate", lambda graph, flags: (error, None))
    ids = np.ones((1, 8), np.int64)
    for _ in range(adapter.REPEATS - 1):
        model(ids, ids)
    with pytest.raises(DeviceError, match="cudaGraphInstantiate failed"):
        model(ids, ids)
    assert list(cuda.handles.values()) == ["stream"]


def test_too_long(installed, load):
    artifact, _ = installed(profiles=["1x1:1x8:2x64"])
    embedder = load(artifact.folder)
    assert embedder.encode([TEXTS[0] * 50]).shape == (1, 64)  # cut to what the engine takes
    embedder = load(artifact.folder, max_length=100)
    with pytest.raises(InputError, match="100 tokens is longer than the 64 that the engine was"):
        embedder.encode([TEXTS[0] * 50])


def test_another_machine(installed, cuda, tensorrt, load):
    artifact, _ = installed()
    cuda.device = ("Fake A100", (8, 0))
    with pytest.raises(DeviceError, match=r"model.plan: the engine runs on Fake H100 .*Fake A100"):
        load(artifact.folder)
    cuda.device = ("Fake H100", (9, 0))
    tensorrt("tensorrt", "11.2.0.1")
    with pytest.raises(DeviceError, match=r"TensorRT 11.1.0.106; here is 11.2.0.1: build it here"):
        load(artifact.folder)
    cuda.device = None
    with pytest.raises(DeviceError, match="no GPU can be used here"):
        load(artifact.folder)


def test_version_compatible_engines_may_run_their_code(installed, tensorrt, load):
    artifact, trt = installed(version_compatible=True)
    later = tensorrt("tensorrt", "11.4.0.1")
    later.session, later.profiles = trt.session, trt.profiles
    runtimes = []
    make = later.Runtime
    later.Runtime = lambda logger: runtimes.append(make(logger)) or runtimes[-1]
    load(artifact.folder)
    assert [each.engine_host_code_allowed for each in runtimes] == [True]


def test_a_damaged_engine(installed, load):
    artifact, _ = installed()
    plan = artifact.folder / "engine" / "model.plan"
    plan.write_bytes(b"no plan" + plan.read_bytes())
    write_manifest(artifact.folder, artifact.manifest, "name")
    message = r"TensorRT 11.1.0.106 does not take the engine; the magic number is wrong. Build it"
    with pytest.raises(ArtifactError, match=message):
        load(artifact.folder)


class TestForRTX:
    """Differences of engines that were built ahead of time."""

    @pytest.fixture
    def kernels(self, monkeypatch, tmp_path):
        """A function () -> the files of kernels."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return lambda: sorted((tmp_path / "cache" / "embedport" / "tensorrt-rtx").glob("*"))

    def test_its_own_graphs(self, installed, cuda, rtx, load):
        artifact, trt = installed("tensorrt-rtx", profiles=PROFILES)
        model = load(artifact.folder).model
        ids = np.ones((1, 8), np.int64)
        for _ in range(adapter.REPEATS + 2):
            model(ids, ids)
        assert cuda.launches == 0
        assert len(trt.contexts) == len(PROFILES)
        for config in trt.contexts:
            assert config.cuda_graph_strategy == rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            assert config.strategy == rtx.ExecutionContextAllocationStrategy.USER_MANAGED

    def test_kernels_are_kept(self, installed, cuda, kernels, load):
        artifact, trt = installed("tensorrt-rtx")
        model = load(artifact.folder).model
        ids = np.ones((1, 8), np.int64)
        assert kernels() == []
        model(ids, ids)
        (file,) = kernels()
        sha256 = artifact.manifest.files["engine/model.plan"].sha256
        machine = f"fake-h100-compute-capability-9-0-13-2-{trt.__version__.replace('.', '-')}"
        assert file.name == f"{sha256[:32]}-{machine}.kernels"
        assert read_cached(file) == b"context 0\nshape (1, 8)"
        # A new shape's kernels are kept at the fourth batch.
        for tokens in (16, 16, 16):
            ids = np.ones((1, tokens), np.int64)
            model(ids, ids)
        kept = read_cached(file)
        assert kept is not None
        assert b"shape (1, 16)" in kept
        model = load(artifact.folder).model
        assert trt.contexts[-1].cache.compiled > set(kept.decode().split("\n"))
        cuda.driver = 13030
        load(artifact.folder).model(ids, ids)
        assert len(kernels()) == 2

    def test_damaged_kernels(self, installed, kernels, load):
        artifact, trt = installed("tensorrt-rtx")
        ids = np.ones((1, 8), np.int64)
        load(artifact.folder).model(ids, ids)
        (file,) = kernels()
        file.write_bytes(file.read_bytes()[:-1])
        load(artifact.folder).model(ids, ids)
        assert trt.contexts[-1].cache.compiled == {"context 1", "shape (1, 8)"}
        assert read_cached(file) == b"context 1\nshape (1, 8)"

    def test_kernels_for_another_driver(self, installed, kernels, caplog, load):
        """The library has the last word; what it does not take is compiled and kept again."""
        artifact, trt = installed("tensorrt-rtx")
        ids = np.ones((1, 8), np.int64)
        load(artifact.folder).model(ids, ids)
        trt.takes_kept_kernels = False
        with caplog.at_level("INFO"):
            load(artifact.folder).model(ids, ids)
        assert "is not for this machine: its kernels are compiled again" in caplog.text
        (file,) = kernels()
        assert read_cached(file) == b"context 1\nshape (1, 8)"

    def test_another_gpu(self, installed, cuda, load):
        artifact, _ = installed("tensorrt-rtx")
        cuda.device = ("Fake A100", (8, 0))
        message = (
            r"model.plan: the engine runs on GPUs of compute capability 9.0; here is Fake A100"
        )
        with pytest.raises(DeviceError, match=message):
            load(artifact.folder)

    def test_another_release(self, installed, tensorrt, load):
        artifact, _ = installed("tensorrt-rtx")
        tensorrt("tensorrt-rtx", "1.8.0.1")
        with pytest.raises(
            DeviceError, match=r"TensorRT for RTX 1\.7\..*; here is 1.8.0.1: build it"
        ):
            load(artifact.folder)


class TestWithoutAGPU:
    """With TensorRT for RTX itself, its own runtime included."""

    def test_loading(self, engines, load):
        with pytest.raises(DeviceError, match=r"engine/model.plan: no GPU can be used here \(CUDA"):
            load(engines().folder)

    def test_on_the_command_line(self, engines, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["embedport", "encode", str(engines().folder), "a text"])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "no GPU can be used here" in said
        assert "Traceback" not in said

    def test_its_graph_runs_on_the_cpu(self, engines, graphs, load):
        vectors = load(engines().folder, device="cpu", max_length=128).encode(TEXTS)
        expected = load(graphs().folder, device="cpu", max_length=128).encode(TEXTS)
        np.testing.assert_array_equal(vectors, expected)

    def test_without_the_library(self, engines, monkeypatch, load):
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        message = r"TensorRT for RTX is not installed: pip install 'embedport\[tensorrt-rtx\]'"
        with pytest.raises(MissingPackageError, match=message):
            load(engines().folder)

    def test_a_plan_that_is_none(self, rtx, tmp_path, cuda):
        """The message holds the words of the library's own runtime."""
        plan = tmp_path / "model.plan"
        plan.write_bytes(b"no plan at all" * 100)
        record = EngineRecord(
            "model.plan",
            None,
            rtx.__version__,
            False,
            "none",
            (Profile((1, 1), (1, 8), (1, 8)),),
            "tensorrt-rtx",
            (cuda.device[1],),
        )
        with pytest.raises(ArtifactError, match=r"does not take the engine; .+ Build it again"):
            adapter.load_engine(plan, record, [])


def test_no_such_device(installed, load):
    artifact, _ = installed()
    with pytest.raises(InputError, match="device should be auto, cpu, cuda, tensorrt"):
        load(artifact.folder, device="tpu")
