"""The machine of a measurement, and its fastest matrix products."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..errors import require
from ..machine.cpu import read_cpu, read_memory
from ..requirements import installed_versions
from ..runtimes.batching import count_cores
from ..runtimes.ort_custom_ops import register_kernels

PACKAGES = ("embedport", "onnxruntime", "onnxruntime-gpu", "torch", "numpy", "onnx-ir")
# onnxruntime's product of 8-bit integers.
PRODUCTS = "MatMulIntegerToFloat"
# Sizes of square products: smaller ones lose time to threading, larger ones to memory.
PEAK_SIZES, PEAK_RUNS = (1024, 1536, 2048), 20
# Name of each product to its operator, domain, inputs, and the first input's dtype.
PEAKS = {
    "uint8 x int8": (PRODUCTS, "com.microsoft", ("a", "b", "one", "one", "zero"), np.uint8),
    "fp32": ("MatMul", "", ("a", "b"), np.float32),
}


def describe() -> dict[str, Any]:
    """CPU, cores, memory in bytes, packages, whether our kernels are registered, and the date."""
    ort = require("onnxruntime", "cpu")
    cpu = read_cpu()
    return {
        "cpu": cpu.name,
        "cores": count_cores(),
        "flags": list(cpu.instructions),
        "memory_bytes": read_memory(),
        "python": platform.python_version(),
        "kernels": register_kernels(ort.SessionOptions()),
        "versions": installed_versions(PACKAGES),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def cpu_kind(machine: Mapping[str, Any]) -> str:
    """The kind of CPU, from `describe`: figures of different kinds are not compared."""
    return f"{machine['cpu']} ({', '.join(machine['flags']) or 'no vector instructions known'})"


def measure_peak() -> dict[str, float]:
    """The fastest square product of each kind in onnxruntime, in 10^12 operations per second."""
    return {name: round(max(_speed(name, size) for size in PEAK_SIZES) / 1e12, 3) for name in PEAKS}


def _speed(name: str, size: int) -> float:
    """Operations per second of [size, size] by [size, size], in the fastest of several runs."""
    onnxruntime = require("onnxruntime", "cpu")
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    op_type, domain, inputs, dtype = PEAKS[name]
    weights = generator.integers(-127, 127, (size, size), np.int8)
    values = {
        "b": weights.astype(np.float32) if dtype == np.float32 else weights,
        "one": np.array(1, np.float32),
        "zero": np.array(128, np.uint8),
    }
    graph = helper.make_graph(
        [helper.make_node(op_type, inputs, ["y"], domain=domain)],
        "product",
        [
            helper.make_tensor_value_info(
                "a", helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), (size, size)
            )
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (size, size))],
        [numpy_helper.from_array(values[key], key) for key in set(inputs) - {"a"}],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {"a": generator.integers(0, 255, (size, size)).astype(dtype)}
    seconds = []
    for _ in range(PEAK_RUNS):
        start = time.perf_counter()
        session.run(None, feeds)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
