"""The instruction sets that the kernels have here, and graphs run with and without kernels."""

import contextlib
import ctypes
import mmap
import sys

import numpy as np
import onnxruntime
import pytest

from embedport.errors import InputError
from embedport.runtimes.ort_custom_ops import VARIABLE, register_kernels

EPS = 1e-6


def here(name):
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(InputError):
        patch.setenv(VARIABLE, name)
        return register_kernels(onnxruntime.SessionOptions()) == name
    return False


# The instruction sets that this CPU has; the others run under emulation (tests/cpus).
SETS = [name for name in ("avx512", "avx2", "neon") if here(name)]
needs_kernels = pytest.mark.skipif(not SETS, reason="no C compiler, or neither AVX2 nor NEON")


def run(graph, feeds, *, kernels):
    inputs = {name: at_an_end(value) for name, value in feeds.items()}
    return open_session(graph, kernels=kernels).run(None, inputs)


def open_session(graph, *, kernels):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if kernels:
        register_kernels(options)
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def at_an_end(array):
    """A copy at the end of memory, which onnxruntime does not copy: who reads beyond it crashes."""
    if sys.platform == "win32":
        return array
    size = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes)
    copy[:] = array.ravel()
    return copy.reshape(array.shape)


@pytest.fixture(params=SETS or [None])
def instructions(request, monkeypatch):
    """Each instruction set that is here, chosen by hand."""
    monkeypatch.setenv(VARIABLE, request.param or "none")
    return request.param


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32) * 3
