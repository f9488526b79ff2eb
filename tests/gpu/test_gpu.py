"""What only a GPU can show: its results against the same graph's on the CPU.

None of this has run where it was written: see docs/gpu.md.
"""

import numpy as np
import pytest

import embedport
from embedport.demo.samples import builtin_pairs, builtin_samples
from embedport.errors import DeviceError
from embedport.exporters.tensorrt import obstacle

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
    if reason := obstacle():
        pytest.skip(reason)

    def make(precision, task):
        if (precision, task) not in made:
            folder = tmp_path_factory.mktemp("engine") / "artifact"
            embedport.export(
                checkpoints("blocks", task), folder, format="tensorrt", precision=precision
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
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("device", ["cuda", "tensorrt"])
def test_onnxruntime(tmp_path, checkpoints, device, precision, task):
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
