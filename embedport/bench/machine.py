"""What a measurement runs on, and the fastest that it multiplies."""

from __future__ import annotations

import datetime
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import require
from ..runtimes.batching import count_cores

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")
PACKAGES = ("embedport", "onnxruntime", "onnxruntime-gpu", "torch", "numpy", "onnx-ir")
# onnxruntime's product of 8-bit integers.
PRODUCTS = "MatMulIntegerToFloat"
# A square product that fills the cores, and each product of the graph is one like it.
PEAK_SIZE, PEAK_RUNS = 2048, 10


def describe() -> dict[str, Any]:
    """Processor, cores, memory in bytes, packages and the day."""
    cpu, flags = platform.processor(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        fields = dict(
            line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line
        )
        fields = {key.strip(): value.strip() for key, value in fields.items()}
        cpu, flags = fields.get("model name", cpu), fields.get("flags", "")
    return {
        "cpu": cpu,
        "cores": count_cores(),
        "flags": [flag for flag in FLAGS if flag in flags.split()],
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def measure_peak() -> dict[str, float]:
    """The fastest square product of each kind in onnxruntime, in 10^12 operations a second."""
    onnxruntime = require("onnxruntime", "cpu")
    from onnx import TensorProto, helper, numpy_helper

    size = PEAK_SIZE
    generator = np.random.default_rng(0)
    int8 = numpy_helper.from_array(generator.integers(-127, 127, (size, size), np.int8), "b")
    fp32 = numpy_helper.from_array(generator.standard_normal((size, size), np.float32), "b")
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    cases = {
        "uint8 x int8": (PRODUCTS, ["a", "b", "one", "one", "zero"], TensorProto.UINT8, int8),
        "fp32": ("MatMul", ["a", "b"], TensorProto.FLOAT, fp32),
    }
    found = {}
    for name, (op_type, inputs, dtype, weights) in cases.items():
        domain = "com.microsoft" if op_type == PRODUCTS else ""
        graph = helper.make_graph(
            [helper.make_node(op_type, inputs, ["y"], domain=domain)],
            "product",
            [helper.make_tensor_value_info("a", dtype, (size, size))],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (size, size))],
            [each for each in (weights, one, zero) if each.name in inputs],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        feeds = {
            "a": generator.integers(0, 255, (size, size)).astype(
                helper.tensor_dtype_to_np_dtype(dtype)
            )
        }
        seconds = []
        for _ in range(PEAK_RUNS):
            began = time.perf_counter()
            session.run(None, feeds)
            seconds.append(time.perf_counter() - began)
        found[name] = round(2 * size**3 / min(seconds) / 1e12, 3)
    return found
