"""Initializers of quantized matrices; a matrix is quantized when they are written."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import onnx_ir as ir

from ...quantize.fp8 import quantize_fp8
from ...quantize.schemes import QuantizedTensor, QuantScheme
from ...quantize.source import WeightSource
from . import code_layouts
from .code_layouts import packed
from .tensors import lazy_tensor, transposed

INT8, INT4, UINT8 = ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT8
# Matrices to cache: two threads write the codes, scales and zero points one after another.
REMEMBERED = 2


class QuantizedMatrices:
    """The quantized matrices of a model by name; the last ones are cached.

    Args:
        quantize: A function from a matrix's name to its QuantizedTensor.
    """

    def __init__(self, quantize: Callable[[str], QuantizedTensor]) -> None:
        self._quantize = lru_cache(REMEMBERED)(quantize)
        self._lock = threading.Lock()

    def __call__(self, name: str) -> QuantizedTensor:
        """Quantize the matrix `name` or take it from the cache; threads share the result."""
        with self._lock:
            return self._quantize(name)


@dataclass(frozen=True)
class QuantizedMatrix:
    """A matrix [out, in] of a graph, as initializers in the layouts of the dialects' operators.

    Attributes:
        name: The matrix's name, without ".weight".
        shape: (out, in).
        scheme: How it is quantized.
        matrices: Provides the quantized matrix.
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme
    matrices: QuantizedMatrices

    @property
    def groups(self) -> int:
        """Groups per output row."""
        return -(-self.shape[1] // (self.scheme.group_size or self.shape[1]))

    def codes_transposed(self) -> ir.LazyTensor:
        """int8 or int4 [in, out], around zero.

        Codes without groups are multiplied with 8-bit activations, so they are checked when they
        are written: see `code_layouts.check_pairs`.
        """

        def make(tensor: QuantizedTensor) -> np.ndarray:
            if tensor.scheme.group_size is None:
                code_layouts.check_pairs(self.name, tensor)
            return code_layouts.signed_transposed(tensor)

        dtype = INT8 if self.scheme.bits == 8 else INT4
        return self._part("codes", make, dtype, self.shape[::-1])

    def codes_in_blocks(self) -> ir.LazyTensor:
        """uint8 [out, groups, group_size * bits / 8]."""
        assert self.scheme.group_size is not None
        size = self.scheme.group_size * self.scheme.bits // 8
        return self._part("codes", code_layouts.blocks, UINT8, (self.shape[0], self.groups, size))

    def codes_as_table(self) -> ir.LazyTensor:
        """uint8 [out, in * bits / 8]."""
        bits = self.scheme.bits
        shape = (self.shape[0], self.shape[1] * bits // 8)
        return self._part("codes", lambda tensor: packed(tensor.codes, bits), UINT8, shape)

    def codes_signed(self) -> ir.LazyTensor:
        """int8 [out, in], around zero."""
        assert self.scheme.bits == 8
        return self._part("codes", QuantizedTensor.signed_codes, INT8, self.shape)

    def scales(self, dtype: ir.DataType) -> ir.LazyTensor:
        """[out, groups] in a floating dtype."""
        return self._scales(np.asarray, dtype, (self.shape[0], self.groups))

    def scales_flat(self, dtype: ir.DataType) -> ir.LazyTensor:
        """[out] in a floating dtype, for one group per output row."""
        return self._scales(lambda scales: scales[:, 0], dtype, self.shape[:1])

    def scales_transposed(self, dtype: ir.DataType) -> ir.LazyTensor:
        """[groups, out] in a floating dtype."""
        return self._scales(np.transpose, dtype, (self.groups, self.shape[0]))

    def zero_points(self) -> ir.LazyTensor | None:
        """uint8 [out, ceil(groups * bits / 8)]; None for a symmetric scheme."""
        if self.scheme.symmetric:
            return None
        bits = self.scheme.bits
        shape = (self.shape[0], -(-self.groups * bits // 8))
        return self._part(
            "zero_points", lambda tensor: packed(tensor.zero_points, bits), UINT8, shape
        )

    def _scales(
        self,
        arrange: Callable[[np.ndarray], np.ndarray],
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> ir.LazyTensor:
        def make(tensor: QuantizedTensor) -> np.ndarray:
            return np.ascontiguousarray(arrange(tensor.scales), dtype.numpy())

        return self._part("scales", make, dtype, shape)

    def _part(
        self,
        part: str,
        make: Callable[[QuantizedTensor], np.ndarray],
        dtype: ir.DataType,
        shape: tuple[int, ...],
    ) -> ir.LazyTensor:
        return lazy_tensor(
            f"{self.name}.{part}", lambda: make(self.matrices(self.name)), dtype, shape
        )


@dataclass(frozen=True)
class Float8Matrix:
    """A matrix [out, in] of a graph in float8 (e4m3), with a scale an output row.

    Attributes:
        name: The matrix's name, without ".weight".
        shape: (out, in).
        weights: Provides the matrix in fp32.
    """

    name: str
    shape: tuple[int, int]
    weights: WeightSource

    def codes_transposed(self) -> ir.LazyTensor:
        """float8_e4m3fn [in, out]."""
        return lazy_tensor(
            f"{self.name}.codes",
            lambda: transposed(self._quantize()[0]),
            ir.DataType.FLOAT8E4M3FN,
            self.shape[::-1],
        )

    def scales_flat(self, dtype: ir.DataType) -> ir.LazyTensor:
        """[out] in a floating dtype."""
        return lazy_tensor(
            f"{self.name}.scales",
            lambda: self._quantize()[1][:, 0].astype(dtype.numpy()),
            dtype,
            self.shape[:1],
        )

    def _quantize(self) -> tuple[np.ndarray, np.ndarray]:
        scheme = QuantScheme(8, None, symmetric=True)
        return quantize_fp8(self.weights.read_fp32(f"{self.name}.weight"), scheme)
