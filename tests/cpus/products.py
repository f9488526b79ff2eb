"""Worst-case codes through every product that rounds activations to 8 bits.

Each case is a small graph as a dialect writes it, with activations of -127 and 127 (codes 1 and 255
around 128) and weights at their limits; what is expected is integer arithmetic on the codes, and
is smaller than 2^24, so float32 holds it exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from embedport.artifact.segments import emulate_16_bits
from embedport.exporters.graph.builder import GraphBuilder
from embedport.exporters.graph.dialect import FLOAT, INT8, UINT8, Rows, ScaledTensor, apply_scales
from embedport.exporters.graph.dialect_table import find_dialect
from embedport.exporters.graph.initializers import QuantizedMatrices, QuantizedMatrix
from embedport.quantize.formats import Format
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantizedTensor

WIDTH = 512
# Pairs of int8 codes at the limit, of equal and of opposite signs.
PAIRS = [(127, 1), (1, 127), (64, 64), (100, 28), (127, -127), (127, 0)]
ROWS = 33
GROUPS = ("int8/32s", "int8/64s", "int8/128s", "int8/128", "int4/32", "int4/64", "int4/128s")


class Case(NamedTuple):
    """A product: its graph as bytes, its inputs one after the other, and what is exact of each."""

    name: str
    graph: bytes
    x: np.ndarray
    expected: np.ndarray


def activations() -> np.ndarray:
    """float32 [1, ROWS, WIDTH] of whole numbers up to 127: all one sign, pairs, alternating."""
    kinds = [(127, 127), (-127, -127), (127, -127), (-127, 127), (127, 126), (0, -127), (1, 127)]
    values = [np.tile(np.array(kind, np.float32), WIDTH // 2) for kind in kinds]
    return np.stack([values[i % len(kinds)] for i in range(ROWS)])[None]


def limited_codes() -> np.ndarray:
    """int8 [out, WIDTH]: each of PAIRS and its negative throughout, and mixed."""
    pairs = [pair for a, b in PAIRS for pair in ((a, b), (-a, -b))]
    uniform = [np.tile(np.array(pair), WIDTH // 2) for pair in pairs]
    mixed = np.random.default_rng(0).choice(np.array(pairs), (4, WIDTH // 2)).reshape(4, -1)
    return np.concatenate([np.stack(uniform), mixed]).astype(np.int8)


def worst_weights() -> np.ndarray:
    """float32 [out, WIDTH], whose codes would all be at the ends of the range."""
    generator = np.random.default_rng(1)
    kinds = [(1, 1), (-1, -1), (1, -1), (1, 0.9), (1, 0.01)]
    uniform = np.stack([np.tile(np.array(kind), WIDTH // 2) for kind in kinds])
    random = generator.uniform(-1, 1, (8, WIDTH)), generator.standard_normal((8, WIDTH))
    return np.concatenate([uniform, *random]).astype(np.float32)


def tensor_of(text: str, codes: np.ndarray) -> QuantizedTensor:
    """Codes (around their zero points) at scales of 1; zero points spread over their range."""
    scheme = Format.parse(text).scheme
    groups = -(-codes.shape[1] // (scheme.group_size or codes.shape[1]))
    zeros = np.full((len(codes), groups), scheme.middle, np.uint8)
    stored = codes.astype(np.int16) + scheme.middle
    if not scheme.symmetric:
        zeros = np.resize(np.array([0, scheme.levels - 1, scheme.middle], np.uint8), zeros.shape)
    ones = np.ones(zeros.shape, np.float32)
    return QuantizedTensor(scheme, stored.astype(np.uint8), ones, zeros)


def matrix_of(tensor: QuantizedTensor) -> QuantizedMatrix:
    rows, columns = tensor.codes.shape
    return QuantizedMatrix(
        "matrix", (rows, columns), tensor.scheme, QuantizedMatrices(lambda _: tensor)
    )


def whole(tensor: QuantizedTensor) -> np.ndarray:
    """Weights at scales of 1: int64 [out, in]."""
    size = tensor.scheme.group_size or tensor.codes.shape[1]
    zeros = np.repeat(tensor.zero_points, size, axis=1)[:, : tensor.codes.shape[1]]
    return tensor.codes.astype(np.int64) - zeros


def graph_of(
    describe: Callable[[GraphBuilder, ir.Value], ir.Value],
    dialect: str,
    dtype: ir.DataType = FLOAT,
    *,
    emulated: bool = False,
) -> bytes:
    """A graph of one input `x`, [1, tokens, WIDTH], and one output."""
    g = find_dialect(dialect).builder()
    g.scope = "product"
    x = ir.val("x", dtype=dtype, shape=(1, None, WIDTH))
    out = g.cast(describe(g, x), FLOAT)
    model = g.model([x], [out], "product")
    if emulated:
        emulate_16_bits(model)
    return ir.to_proto(model).SerializeToString()


def by_rows(name: str, tensor: QuantizedTensor) -> Iterator[Case]:
    """8-bit weights with a scale an output row, as `graph.linear` writes the product."""
    weights = whole(tensor)
    for dialect, arithmetic in (("ort", "fp32"), ("standard", "fp32"), ("standard", "bf16")):
        chosen = find_dialect(dialect)
        compute = FLOAT if arithmetic == "fp32" else ir.DataType.BFLOAT16

        def describe(g: GraphBuilder, x: ir.Value, chosen=chosen, compute=compute) -> ir.Value:
            rows = chosen.quantize_rows(g, x, WIDTH, INT8)
            value = chosen.matmul_rows(g, rows, matrix_of(tensor), compute)
            return apply_scales(g, ScaledTensor(value, rows.scales))

        graph = graph_of(describe, dialect, emulated=compute != FLOAT)
        x = activations()
        exact = x.astype(np.int64) @ weights.T
        if compute != FLOAT:
            exact = exact.astype(np.float32).astype(compute.numpy())
        yield Case(f"{name} {dialect} {arithmetic}", graph, x, exact.astype(np.float32))


def by_codes(tensor: QuantizedTensor) -> Iterator[Case]:
    """Activations' codes 0 to 255 themselves: 0 is none that rows are rounded to."""
    dialect = find_dialect("ort")

    def describe(g: GraphBuilder, x: ir.Value) -> ir.Value:
        rows = Rows(x, g.constant([[[1]]], FLOAT))
        return dialect.matmul_rows(g, rows, matrix_of(tensor), FLOAT)

    graph = graph_of(describe, "ort", UINT8)
    kinds = [(255, 255), (0, 0), (255, 0), (0, 255)]
    x = np.stack([np.tile(np.array(kind, np.uint8), WIDTH // 2) for kind in kinds])[None]
    exact = (x.astype(np.int64) - 128) @ whole(tensor).T
    yield Case("int8 ort, codes 0 and 255", graph, x, exact.astype(np.float32))


def by_groups(text: str, dialect: str) -> Iterator[Case]:
    """Weights in groups, all codes of their range, the ends most of all."""
    scheme = Format.parse(text).scheme
    ends = np.array([-scheme.middle, scheme.middle - 1])
    pairs = [(a, b) for a in ends for b in ends]
    uniform = np.stack([np.tile(np.array(pair), WIDTH // 2) for pair in pairs])
    random = np.random.default_rng(0).integers(-scheme.middle, scheme.middle, (12, WIDTH))
    tensor = tensor_of(text, np.concatenate([uniform, random]))
    chosen = find_dialect(dialect)
    graph = graph_of(lambda g, x: chosen.matmul_groups(g, x, matrix_of(tensor)), dialect)
    x = activations()
    exact = (x.astype(np.int64) @ whole(tensor).T).astype(np.float32)
    yield Case(f"{text.replace('/', ' in groups of ')} {dialect}", graph, x, exact)


def cases() -> Iterator[Case]:
    """Every product of the dialects."""
    limited = tensor_of("int8", limited_codes())
    yield from by_rows("int8", limited)
    yield from by_codes(limited)
    quantized = quantize_rtn(worst_weights(), limited.scheme)
    ones = np.ones_like(quantized.scales)
    codes = QuantizedTensor(quantized.scheme, quantized.codes, ones, quantized.zero_points)
    yield from by_rows("int8 quantized", codes)
    for text in GROUPS:
        for dialect in ("ort", "standard"):
            if dialect == "ort" or Format.parse(text).scheme.symmetric:
                yield from by_groups(text, dialect)


def write_cases(folder: Path) -> None:
    """A file a case, for `check_products.py`, which knows nothing of embedport."""
    folder.mkdir(parents=True)
    for case in cases():
        graph = np.frombuffer(case.graph, np.uint8)
        np.savez(folder / f"{case.name}.npz", graph=graph, expected=case.expected, x=case.x)
