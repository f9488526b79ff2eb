"""Quantized weights that stay quantized: memory on a CPU, products on a GPU.

`gpu_paths` measures whole checkpoints on a GPU.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import run

# Eight layers and the whole table: 0.56 GB in 16 bits.
GEOMETRY = "0.6b-8"
TEXTS = 16
# Encodes texts and prints by how much its memory grew since its libraries were imported.
PROGRAM = """
import resource, sys
import embedport, embedport.runtimes, onnxruntime
if sys.argv[2] == "torch":
    import torch, transformers
    transformers.Qwen3Model
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
embedder = embedport.load(sys.argv[1], device="cpu")
embedder.encode(["a text about tea, and what it is " * 3] * int(sys.argv[3]))
print(embedder.precision, before, peak(), sep="|")
"""


def measure_memory(results: Path = RESULTS) -> None:
    """Peak memory of a bf16 checkpoint and of its W4A16, when the graph is built and afterwards."""
    figures: dict[str, dict[str, Any]] = {}
    with scratch() as temporary:
        os.environ["XDG_CACHE_HOME"] = str(temporary)
        source, out = checkpoint(GEOMETRY), temporary / "w4a16"
        run([sys.executable, "-m", "benchmarks.packed", str(source), str(out), "awq"])
        for name, folder, library in (
            ("bf16", source, "torch"),
            ("W4A16, the graph is built", out, "onnxruntime"),
            ("W4A16", out, "onnxruntime"),
        ):
            finished = run([sys.executable, "-c", PROGRAM, str(folder), library, str(TEXTS)])
            precision, before, peak = finished.output.strip().splitlines()[-1].split("|")
            figures[name] = {
                "precision": precision,
                "checkpoint_bytes": sum(p.stat().st_size for p in folder.glob("*.safetensors")),
                "libraries_bytes": int(before),
                "peak_bytes": int(peak),
            }
    save("packed_cpu", {"geometry": GEOMETRY, "rows": figures}, results)
    print_table(
        ["checkpoint", "MB on disk", "computed in", "peak MB", "of which libraries"],
        [
            [
                name,
                row["checkpoint_bytes"] // 10**6,
                row["precision"],
                row["peak_bytes"] // 10**6,
                row["libraries_bytes"] // 10**6,
            ]
            for name, row in figures.items()
        ],
    )


# Matrices that a layer multiplies by, (out, in).
LAYERS = {
    "0.6b": ((4096, 1024), (1024, 2048), (6144, 1024), (1024, 3072)),
    "8b": ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288)),
}
TOKENS = (16, 32, 64, 128, 256, 1024, 8192)


def measure_products(results: Path = RESULTS) -> None:
    """Microseconds of a layer's products by kind and number of tokens, for `FUSED_TOKENS`.

    Without a GPU nothing is measured.
    """
    import torch

    if not torch.cuda.is_available():
        print("Nothing was measured: torch has no CUDA device here")
        return
    rows = [
        {"geometry": geometry, "tokens": tokens, **_products(shapes, tokens)}
        for geometry, shapes in LAYERS.items()
        for tokens in TOKENS
    ]
    save("packed_gpu", {"gpu": torch.cuda.get_device_name(), "rows": rows}, results)
    print_table([*rows[0]], [[*row.values()] for row in rows])


def _products(shapes: Sequence[tuple[int, int]], tokens: int) -> dict[str, float]:
    import torch
    from triton.testing import do_bench

    from embedport.runtimes.packed import kernels
    from embedport.runtimes.packed.matrices import PackedMatrix, ScaledMatrix
    from embedport.runtimes.triton_kernels import round_rows

    totals = dict.fromkeys(("bf16", "4 bits, fused", "4 bits, unpacked first", "int8"), 0.0)
    for outputs, width in shapes:
        x = torch.randn((tokens, width), device="cuda", dtype=torch.bfloat16)
        weight = torch.randn((outputs, width), device="cuda", dtype=torch.bfloat16)
        groups = width // 128
        codes = torch.randint(0, 256, (outputs, width // 2), device="cuda", dtype=torch.uint8)
        zeros = torch.randint(0, 16, (groups, outputs), device="cuda", dtype=torch.uint8)
        scales = torch.rand((groups, outputs), device="cuda", dtype=torch.bfloat16)
        buffer = torch.empty_like(weight)
        matrix = PackedMatrix(codes, scales, zeros, None, 4, 128, width, buffer)
        rows, int8 = round_rows(x, torch.int8), round_rows(weight, torch.int8)
        assert int8.scales is not None
        scaled = ScaledMatrix(int8.values, int8.scales.t().contiguous())
        linear = torch.nn.functional.linear
        for name, steps in {
            "bf16": [partial(linear, x, weight)],
            "4 bits, fused": [partial(kernels.multiply_packed, x, matrix)],
            "4 bits, unpacked first": [
                partial(kernels.unpack, matrix, buffer),
                partial(linear, x, buffer),
            ],
            "int8": [partial(scaled, rows, torch.bfloat16)],
        }.items():
            totals[name] += 1000 * sum(map(do_bench, steps))
    return {name: round(value, 1) for name, value in totals.items()}


if __name__ == "__main__":
    # A child process writes it: a child's peak memory starts at its parent's.
    from tests.synthetic import round_to_nearest

    shutil.rmtree(sys.argv[2], ignore_errors=True)
    round_to_nearest(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
