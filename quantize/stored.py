"""A checkpoint whose projections are already quantized: its codes, bit for bit, or their values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import CheckpointError
from ..files import TensorInfo, open_shard, read_headers
from ..spec import ModelSpec
from ..stored import LibraryQuantization, StoredQuantization
from ..weights import DTYPES, Weights
from .schemes import QuantizedTensor, QuantScheme

# The order in which AutoAWQ's "gemm" puts eight output channels into one int32.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class _Layout:
    """What a method calls the parts of a matrix; `order` tells of columns in another order."""

    codes: str
    zero_points: str
    scales: str
    order: str


_LAYOUTS = {
    "gptq": _Layout("qweight", "qzeros", "scales", "g_idx"),
    "awq": _Layout("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": _Layout(
        "weight_packed", "weight_zero_point", "weight_scale", "weight_g_idx"
    ),
}


class StoredWeights(Weights):
    """The tensors of a GPTQ, AWQ or pack-quantized checkpoint.

    A quantized matrix is read as what it stands for.
    A projection that the checkpoint left in floating point is read as it is.

    Args:
        spec: The checkpoint's spec, with its `quantization`.

    Attributes:
        bits: Of the codes.
        schemes: The quantized projections, without ".weight".

    Raises:
        CheckpointError: As `Weights`; or a part of a quantized projection is missing, has another
            shape or dtype, or its columns are in another order (act-order).
    """

    def __init__(self, spec: ModelSpec) -> None:
        assert isinstance(spec.quantization, StoredQuantization)
        self.quantization: StoredQuantization = spec.quantization
        self.bits = self.quantization.bits
        self._layout = _LAYOUTS[self.quantization.method]
        self._parts = {
            name.removeprefix("model."): info
            for name, info in read_headers(spec.source.folder).items()
            if name.rpartition(".")[2] in vars(self._layout).values()
        }
        super().__init__(spec)
        self.schemes: dict[str, QuantScheme] = {}
        for name, shape in spec.tensor_shapes().items():
            matrix = name.removesuffix(".weight")
            if f"{matrix}.{self._layout.codes}" in self._parts:
                self._check_parts(matrix, shape[0], shape[1])
                stored, middle = self.quantization, 1 << (self.bits - 1)
                symmetric = bool((self._zero_points(matrix) == middle).all())
                self.schemes[matrix] = QuantScheme(self.bits, stored.group_size, symmetric)

    def _find(self, name: str, headers: dict[str, TensorInfo]) -> TensorInfo | None:
        return super()._find(name, headers) or self._parts.get(_part(name, self._layout.codes))

    def _check_tensor(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if not info.name.endswith(f".{self._layout.codes}"):
            super()._check_tensor(info, shape)

    def _check_parts(self, matrix: str, rows: int, columns: int) -> None:
        stored, layout = self.quantization, self._layout
        codes = 32 // stored.bits
        file = self._parts[f"{matrix}.{layout.codes}"].file
        if columns % stored.group_size or rows % codes:
            raise CheckpointError(
                f"{file}: {matrix} of {rows} x {columns} cannot be in groups of "
                f"{stored.group_size} and words of {codes} codes"
            )
        groups = columns // stored.group_size
        words = {
            "gptq": (columns // codes, rows),
            "awq": (columns, rows // codes),
            "compressed-tensors": (rows, columns // codes),
        }[stored.method]
        # compressed-tensors has an output channel a row, the others a column.
        by_row = stored.method == "compressed-tensors"
        expected = {layout.codes: (words, ("I32",))}
        if not by_row or self._has(matrix, layout.zero_points):
            shape = (rows // codes, groups) if by_row else (groups, rows // codes)
            expected[layout.zero_points] = (shape, ("I32",))
        shape = (rows, groups) if by_row else (groups, rows)
        expected[layout.scales] = (shape, tuple(DTYPES))
        for part, (shape, dtypes) in expected.items():
            info = self._parts.get(f"{matrix}.{part}")
            if info is None:
                raise CheckpointError(
                    f"{file}: {matrix}.{part} is missing beside {matrix}.{layout.codes}"
                )
            if info.shape != shape or info.dtype not in dtypes:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} should be {' or '.join(dtypes)} of shape "
                    f"{list(shape)} by config.json, found {info.dtype} of {list(info.shape)}"
                )
        if self._has(matrix, layout.order) and not np.array_equal(
            self._read_part(matrix, layout.order), np.arange(columns) // stored.group_size
        ):
            raise CheckpointError(
                f"{file}: {matrix}.{layout.order} puts the columns in another order (act-order: "
                "desc_act), which is not read; quantize with desc_act false, or give the original"
            )

    def _has(self, matrix: str, part: str) -> bool:
        return f"{matrix}.{part}" in self._parts

    def _read_part(self, matrix: str, part: str) -> np.ndarray:
        info = self._parts[f"{matrix}.{part}"]
        with open_shard(info.file) as shard:
            return shard.get_tensor(info.name)

    def _zero_points(self, matrix: str) -> np.ndarray:
        """uint8 [out, groups]."""
        stored, part = self.quantization, self._layout.zero_points
        if not self._has(matrix, part):
            shape = self._parts[f"{matrix}.{self._layout.scales}"].shape
            return np.full(shape, 1 << (stored.bits - 1), np.uint8)
        words = self._read_part(matrix, part)
        if stored.method == "awq":
            return unpack_awq(words).T
        if stored.method == "compressed-tensors":
            return unpack(words.T, stored.bits).T
        highest = np.uint8((1 << stored.bits) - 1)
        return ((unpack(words, stored.bits) + np.uint8(stored.zero_point_offset)) & highest).T

    def read_quantized(self, matrix: str) -> QuantizedTensor:
        """The codes, scales and zero points of a projection, as stored.

        Args:
            matrix: Its name, without ".weight"; one of `schemes`.

        Returns:
            A tensor whose float32 scales are the stored ones exactly.
        """
        words, scales = (
            self._read_part(matrix, part) for part in (self._layout.codes, self._layout.scales)
        )
        match self.quantization.method:
            case "awq":
                codes, scales = unpack_awq(words).T, scales.T
            case "gptq":
                codes, scales = unpack(words.T, self.bits), scales.T
            case "compressed-tensors":
                codes = unpack(words, self.bits)
        return QuantizedTensor(
            self.schemes[matrix],
            np.ascontiguousarray(codes),
            np.ascontiguousarray(scales.astype(np.float32)),
            np.ascontiguousarray(self._zero_points(matrix)),
        )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """As `Weights.read`; a quantized projection as `QuantizedTensor.dequantize` gives it."""
        matrix = name.removesuffix(".weight")
        if matrix in self.schemes:
            return self.read_quantized(matrix).dequantize()[rows]
        return super().read(name, rows)


def open_weights(spec: ModelSpec) -> Weights:
    """The weights of a checkpoint, quantized or not.

    Raises:
        CheckpointError: As their classes; or only the library that quantized it reads it.
    """
    check_readable(spec)
    return Weights(spec) if spec.quantization is None else StoredWeights(spec)


def check_readable(spec: ModelSpec) -> None:
    """Refuse a checkpoint of which only the library that quantized it reads the weights.

    Raises:
        CheckpointError: It is one.
    """
    if isinstance(spec.quantization, LibraryQuantization):
        raise CheckpointError(
            f"{spec.source.folder}: a checkpoint in {spec.quantization.precision} gives no weights "
            "to export, only one by GPTQ or AWQ does; give the original in bf16, fp16 or fp32"
        )


def _part(name: str, part: str) -> str:
    return f"{name.removesuffix('.weight')}.{part}"


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """int32 [n, m] to uint8 [n, m * 32 / bits], the lowest bits of a word first."""
    octets = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return octets
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(len(words), -1)


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """int32 [n, m] to uint8 [n, 8 m], in AutoAWQ's order of the eight codes of a word."""
    codes = unpack(words, 4).reshape(len(words), -1, 8)
    ordered = np.empty_like(codes)
    ordered[:, :, AWQ_ORDER] = codes
    return ordered.reshape(len(words), -1)
