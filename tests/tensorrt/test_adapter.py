"""The adapter on an engine that is onnxruntime underneath."""

import numpy as np
import pytest

from embedport.errors import ArtifactError, DeviceError, InputError, MissingPackageError
from embedport.runtimes import tensorrt as adapter
from embedport.texts.samples import builtin_pairs, builtin_samples

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PROFILES = ["1x1:1x8:2x512", "4x16:8x64:16x512"]


def test_embedder(build, graphs, load):
    artifact, trt = build(profiles=PROFILES)
    embedder = load(artifact.folder, max_length=512)
    expected = load(graphs().folder, device="cpu", max_length=512)
    assert (embedder.device, embedder.model.precision) == ("cuda", "fp32")
    for batch_tokens in (64, 4096):
        vectors = embedder.encode(TEXTS, batch_tokens=batch_tokens)
        np.testing.assert_allclose(vectors, expected.encode(TEXTS), atol=1e-5)
    assert {profile for profile, _ in trt.shapes} == {0, 1}


def test_reranker(build, graphs, load):
    artifact, _ = build("reranker", profiles=PROFILES)
    pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
    expected = load(graphs("reranker").folder, device="cpu", max_length=512).score(pairs)
    scores = load(artifact.folder, max_length=512).score(pairs)
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_shapes(build, load):
    """Padded to a multiple of eight and to the profile's least; cut into parts beyond its most."""
    artifact, trt = build(profiles=PROFILES)
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


def test_padding_on_the_left(build, load):
    artifact, _ = build(profiles=PROFILES)
    model = load(artifact.folder).model
    ids = np.arange(10, 17)[None]
    left = np.pad(ids, ((0, 0), (4, 0)))
    expected = model(ids, np.ones_like(ids))
    np.testing.assert_allclose(model(left, (left > 0).astype(np.int64)), expected, atol=1e-6)


def test_repeated_shapes_become_graphs(build, cuda, load):
    artifact, trt = build(profiles=PROFILES)
    model = load(artifact.folder).model
    generator = np.random.default_rng(0)
    for run in range(6):
        ids = generator.integers(5, 200, (2, 8))
        found = model(ids, np.ones_like(ids))
        again = trt.session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
        np.testing.assert_allclose(found, again, atol=1e-6)
        assert cuda.launches == max(0, run + 1 - adapter.REPEATS)
    assert trt.contexts == len(PROFILES) + 1
    other = np.ones((1, 24), np.int64)
    model(other, other)
    assert cuda.launches == 6 - adapter.REPEATS


def test_no_more_graphs_than_that(build, cuda, monkeypatch, load):
    monkeypatch.setattr(adapter, "MAX_GRAPHS", 1)
    artifact, _ = build(profiles=PROFILES)
    model = load(artifact.folder).model
    for tokens in (8, 16):
        for _ in range(adapter.REPEATS + 2):
            ids = np.ones((1, tokens), np.int64)
            model(ids, ids)
    assert cuda.launches == 2


def test_what_cannot_be_captured_runs_all_the_same(build, cuda, monkeypatch, caplog, load):
    artifact, _ = build(profiles=PROFILES)
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


def test_memory_is_given_back(build, cuda, load):
    artifact, _ = build(profiles=PROFILES)
    before = len(cuda._memory)
    embedder = load(artifact.folder)
    assert len(cuda._memory) == before + 7  # two inputs and the output twice, the scratch
    del embedder
    assert len(cuda._memory) == before


def test_streams_and_graphs_are_given_back(build, cuda, monkeypatch, load):
    """A stream and one instantiated graph while the model is there, and nothing after it."""
    artifact, _ = build(profiles=PROFILES)
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


def test_a_graph_that_cannot_be_instantiated_is_given_back(build, cuda, monkeypatch, load):
    artifact, _ = build(profiles=PROFILES)
    model = load(artifact.folder).model
    error = cuda.cudaError_t.cudaErrorNoDevice
    monkeypatch.setattr(cuda, "cudaGraphInstantiate", lambda graph, flags: (error, None))
    ids = np.ones((1, 8), np.int64)
    for _ in range(adapter.REPEATS - 1):
        model(ids, ids)
    with pytest.raises(DeviceError, match="cudaGraphInstantiate failed"):
        model(ids, ids)
    assert list(cuda.handles.values()) == ["stream"]


def test_too_long(build, load):
    artifact, _ = build(profiles=["1x1:1x8:2x64"])
    embedder = load(artifact.folder)
    assert embedder.encode([TEXTS[0] * 50]).shape == (1, 64)  # cut to what the engine takes
    embedder = load(artifact.folder, max_length=100)
    with pytest.raises(InputError, match="100 tokens is longer than the 64 that the engine was"):
        embedder.encode([TEXTS[0] * 50])


def test_another_machine(build, cuda, tensorrt, load):
    artifact, _ = build()
    cuda.device = ("Fake A100", (8, 0))
    with pytest.raises(DeviceError, match=r"model.plan: the engine was built on Fake H100 .*A100"):
        load(artifact.folder)
    cuda.device = ("Fake H100", (9, 0))
    tensorrt("11.2.0.1")
    with pytest.raises(DeviceError, match=r"TensorRT 11.1.0.106; here is 11.2.0.1: build it here"):
        load(artifact.folder)
    cuda.device = None
    with pytest.raises(DeviceError, match="no GPU can be used here"):
        load(artifact.folder)


def test_without_tensorrt(build, monkeypatch, graphs, load):
    artifact, _ = build()
    monkeypatch.undo()
    with pytest.raises(MissingPackageError, match="tensorrt is not installed: pip install"):
        load(artifact.folder)
    vectors = load(artifact.folder, device="cpu").encode(TEXTS)
    expected = load(graphs().folder, device="cpu").encode(TEXTS)
    np.testing.assert_array_equal(vectors, expected)


def test_version_compatible_engines_may_run_their_code(build, tensorrt, load):
    artifact, _ = build(version_compatible=True)
    later = tensorrt("11.4.0.1")
    runtimes = []
    make = later.Runtime
    later.Runtime = lambda logger: runtimes.append(make(logger)) or runtimes[-1]
    load(artifact.folder)
    assert [each.engine_host_code_allowed for each in runtimes] == [True]


def test_tensorrt_does_not_take_the_engine(build, tensorrt, load):
    artifact, trt = build()
    runtime = type(trt.Runtime(None))
    take = runtime.deserialize_cuda_engine
    runtime.deserialize_cuda_engine = lambda self, plan: None
    try:
        with pytest.raises(ArtifactError, match=r"11.1.0.106 does not take the engine"):
            load(artifact.folder)
    finally:
        runtime.deserialize_cuda_engine = take


def test_no_such_device(build, load):
    artifact, _ = build()
    with pytest.raises(InputError, match="device should be auto, cpu, cuda, tensorrt"):
        load(artifact.folder, device="tpu")
