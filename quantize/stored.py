"""Read a checkpoint with quantized projections: the stored codes, or the values they stand for."""

from __future__ import annotations

import logging
from dataclasses import astuple, dataclass

import numpy as np

from ..checkpoint.lora import open_floats
from ..checkpoint.quantization_config import (
    INSTEAD,
    Layout,
    LibraryQuantization,
    MatrixFormat,
    StoredQuantization,
)
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tensor_files import TensorInfo, open_holding, read_headers, read_octets
from ..checkpoint.weights import DTYPES, Weights
from ..errors import CheckpointError
from .schemes import QuantizedTensor, QuantScheme
from .unpacking import float_values, shift, unpack, unpack_awq, unpack_pairs

logger = logging.getLogger(__name__)

FLOAT_DTYPES = tuple(DTYPES)


@dataclass(frozen=True)
class _Names:
    """The tensor names of a quantized matrix's parts, without the matrix's own name.

    Attributes:
        codes: The codes.
        scales: One scale per block.
        zero_points: One zero point per block.
        order: The group of each input (act-order).
        divisor: One number that divides all scales.
    """

    codes: str
    scales: str
    zero_points: str | None = None
    order: str | None = None
    divisor: str | None = None


_NAMES: dict[Layout, _Names] = {
    # int32 words along the inputs, [in / 8, out]; scales [groups, out]; packed zero points.
    "gptq": _Names("qweight", "scales", "qzeros", "g_idx"),
    # int32 words along the outputs, [in, out / 8]; scales and zero points as in GPTQ.
    "awq": _Names("qweight", "scales", "qzeros"),
    # int32 words along the inputs, [out, in / 8]; scales [out, groups]; packed zero points.
    "packed": _Names("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx"),
    # One code per byte, [out, in]; scales and zero points [blocks out, blocks in].
    "plain": _Names("weight", "weight_scale", "weight_zero_point"),
    "fp8": _Names("weight", "weight_scale_inv"),
    # Two codes per byte, [out, in / 2]; float8 scales [out, groups].
    "nvfp4": _Names("weight_packed", "weight_scale", divisor="weight_global_scale"),
}
_WEIGHT = "weight"
# All that a quantized matrix consists of, in any layout, except for what a plain one has too.
_PARTS = {part for names in _NAMES.values() for part in astuple(names)} - {None, _WEIGHT}


class StoredWeights(Weights):
    """The tensors of a checkpoint quantized by another tool.

    Its formats are those of `embedport.checkpoint.quantization_config`.

    A quantized matrix is dequantized when it is read, one matrix in memory at a time. A projection
    that the checkpoint left in floating point is read as it is.

    Args:
        spec: The checkpoint's spec, with its `quantization`.

    Attributes:
        quantization: The quantization that config.json declares.
        formats: The storage format of each quantized projection, by its name without ".weight".
        schemes: The schemes of projections with codes that a graph can use unchanged.

    Raises:
        CheckpointError: As for `Weights`; or a part of a quantized projection is missing or has
            another shape or dtype; or a quantized matrix is not a projection.
    """

    def __init__(self, spec: ModelSpec) -> None:
        quantization = find_stored(spec)
        assert quantization is not None
        self.quantization: StoredQuantization = quantization
        self._parts = {
            name.removeprefix("model."): info
            for name, info in read_headers(spec.source.folder).items()
        }
        self._shapes = spec.tensor_shapes()
        self._orders: dict[str, np.ndarray] = {}
        self.formats: dict[str, MatrixFormat] = {}
        for name in self._shapes:
            matrix = name.removesuffix(".weight")
            form = self._find_format(matrix)
            if form is not None:
                self.formats[matrix] = form
                self._read_order(matrix, form)
        super().__init__(spec)
        self.schemes: dict[str, QuantScheme] = {}
        for matrix, form in self.formats.items():
            size = form.graph_group
            if size is not None and matrix not in self._orders:
                middle = 1 << (form.bits - 1)
                symmetric = bool((self._zero_points(matrix) == middle).all())
                self.schemes[matrix] = QuantScheme(form.bits, size, symmetric)

    def gives_codes(self, bits: int) -> bool:
        """Whether a graph can use the codes of all quantized projections, all of `bits` bits."""
        widths = {scheme.bits for scheme in self.schemes.values()}
        return widths == {bits} and self.schemes.keys() == self.formats.keys()

    def describe(self) -> list[str]:
        """The distinct formats of the projections, in words."""
        reordered = {self.formats[matrix] for matrix in self._orders}
        words = (
            f"{form}, inputs in another order (act-order)" if form in reordered else str(form)
            for form in self.formats.values()
        )
        return list(dict.fromkeys(words))

    def _find(self, name: str, headers: dict[str, TensorInfo]) -> TensorInfo | None:
        matrix = name.removesuffix(".weight")
        if matrix in self.formats:
            return self._part(matrix, _NAMES[self.formats[matrix].layout].codes)
        return super()._find(name, headers)

    def _check_tensor(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        name = info.name.removeprefix("model.")
        if name.rpartition(".")[0] not in self.formats or name.endswith(".bias"):
            super()._check_tensor(info, shape)

    def _part(self, matrix: str, part: str | None) -> TensorInfo | None:
        return None if part is None else self._parts.get(f"{matrix}.{part}")

    def _present(self, matrix: str, part: str | None) -> TensorInfo:
        """A part that is known to be there."""
        info = self._part(matrix, part)
        assert info is not None
        return info

    def _find_format(self, matrix: str) -> MatrixFormat | None:
        """The format that a matrix's parts match; None if it is not quantized."""
        formats = [form for form in self.quantization.formats if self._has_codes(matrix, form)]
        # Those that ask for more parts come first: the others fit as well where these are there. So
        # do codes of fewer bits with a byte each among those of more, which are the same values.
        formats.sort(
            key=lambda form: (form.has_zero_points is not True, not form.has_order, -form.bits)
        )
        if not formats:
            self._refuse_parts(matrix)
            return None
        shape = self._shapes[f"{matrix}.weight"]
        codes = self._present(matrix, _NAMES[formats[0].layout].codes)
        if not matrix.startswith("layers.") or len(shape) != 2:
            raise CheckpointError(
                f"{codes.file}: {matrix} is quantized, and only projections of layers are read so; "
                f"{INSTEAD}"
            )
        plain = self._part(matrix, _WEIGHT)
        if plain not in (None, codes):
            raise CheckpointError(
                f"{codes.file}: {matrix} is there twice, as {codes.name} and as {_WEIGHT}"
            )
        problems = {form: self._problem(matrix, form) for form in formats}
        fitting = [form for form, problem in problems.items() if problem is None]
        if not fitting:
            # Report the problem of the format with the most matching parts.
            raise CheckpointError(max(filter(None, problems.values()), key=lambda each: each[0])[1])
        if self._part(matrix, _NAMES[fitting[0].layout].order) is None:
            self._check_blocks(codes, matrix, fitting)
        return fitting[0]

    def _check_blocks(self, codes: TensorInfo, matrix: str, fitting: list[MatrixFormat]) -> None:
        """Refuse formats that give as many scales, each to other values."""
        shape = self._shapes[f"{matrix}.weight"]
        blocks = {
            tuple(min(size or total, total) for size, total in zip(form.block, shape, strict=True))
            for form in fitting
        }
        if len(blocks) > 1:
            raise CheckpointError(
                f"{codes.file}: the tensors of {matrix} fit several formats that config.json's "
                f"quantization_config declares ({' and '.join(map(str, fitting))}), with as many "
                f"scales in each, and do not show which it is; {INSTEAD}"
            )

    def _refuse_parts(self, matrix: str) -> None:
        """Refuse parts of a quantized matrix that no declared format reads.

        For example, scales beside a weight in 16 bits, by which compressed-tensors rounds it.
        """
        for part in sorted(_PARTS):
            if (info := self._part(matrix, part)) is not None:
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} is part of a quantized matrix, in a form "
                    "other than those that config.json's quantization_config declares "
                    f"({' and '.join(map(str, self.quantization.formats))}); {INSTEAD}"
                )

    def _has_codes(self, matrix: str, form: MatrixFormat) -> bool:
        names = _NAMES[form.layout]
        codes = self._part(matrix, names.codes)
        if codes is None or names.codes != _WEIGHT:
            return codes is not None
        return codes.dtype not in DTYPES or self._part(matrix, names.scales) is not None

    def _problem(self, matrix: str, form: MatrixFormat) -> tuple[int, str] | None:
        """The first problem with a matrix's parts: (number of correct parts before it, message)."""
        codes = self._present(matrix, _NAMES[form.layout].codes)
        for correct, (part, (shapes, dtypes)) in enumerate(self._expected(matrix, form).items()):
            info = self._part(matrix, part)
            if info is None:
                return correct, f"{codes.file}: {matrix}.{part} is missing beside {codes.name}"
            if info.shape not in shapes or info.dtype not in dtypes:
                return correct, (
                    f"{info.file}: tensor {info.name} should be {' or '.join(dtypes)} of shape "
                    f"{' or '.join(str(list(shape)) for shape in shapes)} by config.json, found "
                    f"{info.dtype} of {list(info.shape)}"
                )
        return None

    def _expected(
        self, matrix: str, form: MatrixFormat
    ) -> dict[str, tuple[list[tuple[int, ...]], tuple[str, ...]]]:
        """Each part's allowed shapes and dtypes."""
        names, (rows, columns) = _NAMES[form.layout], self._shapes[f"{matrix}.weight"]
        grid = self._grid(matrix, form)
        per_word = 32 // form.bits
        words: dict[Layout, tuple[int, int]] = {
            "gptq": (-(-columns // per_word), rows),
            "awq": (columns, -(-rows // per_word)),
            "packed": (rows, -(-columns // per_word)),
            "nvfp4": (rows, columns // 2),
        }
        dtypes = {"packed": "I32", "gptq": "I32", "awq": "I32", "nvfp4": "U8"}
        dtype = dtypes.get(form.layout, "I8" if form.kind == "int" else "F8_E4M3")
        expected: dict[str, tuple[list[tuple[int, ...]], tuple[str, ...]]] = {
            names.codes: ([words.get(form.layout, (rows, columns))], (dtype,))
        }
        if form.layout in ("gptq", "awq"):
            expected["qzeros"] = ([(grid[1], -(-rows // per_word))], ("I32",))
            expected[names.scales] = ([grid[::-1]], FLOAT_DTYPES)
        else:
            shapes: list[tuple[int, ...]] = [grid]
            shapes += [(1,), ()] if form.block == (None, None) else []
            scale = ("F8_E4M3",) if form.layout == "nvfp4" else FLOAT_DTYPES
            expected[names.scales] = (shapes, scale)
            zeros = self._part(matrix, names.zero_points)
            if zeros is not None and zeros.dtype == "I32":
                expected["weight_zero_point"] = ([(-(-grid[0] // per_word), grid[1])], ("I32",))
            elif zeros is not None or form.has_zero_points:
                expected["weight_zero_point"] = (shapes, ("I8",))
        if names.divisor is not None:
            expected[names.divisor] = ([(1,), ()], ("F32",))
        has_order = form.has_order and grid[1] > 1
        if names.order is not None and (has_order or self._part(matrix, names.order)):
            expected[names.order] = ([(columns,)], ("I32",))
        return expected

    def _grid(self, matrix: str, form: MatrixFormat) -> tuple[int, int]:
        """The number of a matrix's blocks along its outputs and along its inputs."""
        shape = self._shapes[f"{matrix}.weight"]
        rows, columns = (
            1 if size is None else -(-total // size)
            for total, size in zip(shape, form.block, strict=True)
        )
        return rows, columns

    def _read_order(self, matrix: str, form: MatrixFormat) -> None:
        """Store each input's group in `_orders` if groups are not in input order (act-order)."""
        info = self._part(matrix, _NAMES[form.layout].order)
        if info is None:
            return
        order, groups = self._read_part(info), self._grid(matrix, form)[1]
        # compressed-tensors fills it with -1 if the inputs are in order.
        if form.layout == "packed" and (order == -1).any():
            return
        if order.size and (order.min() < 0 or order.max() >= groups):
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should hold groups below {groups}, found "
                f"{order.min()} to {order.max()}"
            )
        if not np.array_equal(order, _blocks(len(order), form.block[1])):
            self._orders[matrix] = order

    def _read_part(self, info: TensorInfo) -> np.ndarray:
        if info.dtype == "F8_E4M3":  # numpy has no fp8: read the codes
            return np.frombuffer(read_octets(info), np.uint8).reshape(info.shape)
        with open_holding(info) as shard:
            return shard.get_tensor(info.name)

    def _read_named(self, matrix: str, part: str | None) -> np.ndarray:
        return self._read_part(self._present(matrix, part))

    def _codes(self, matrix: str) -> np.ndarray:
        """Read a matrix's codes: uint8 [out, in]."""
        form = self.formats[matrix]
        rows, columns = self._shapes[f"{matrix}.weight"]
        stored = self._read_named(matrix, _NAMES[form.layout].codes)
        match form.layout:
            case "gptq":
                codes = unpack(stored.T, form.bits)
            case "awq":
                codes = unpack_awq(stored).T
            case "packed":
                codes = unpack(stored, form.bits)
            case "nvfp4":
                codes = unpack_pairs(stored)
            case _ if form.kind == "int":
                codes = shift(stored, form.bits)
                if form.bits < 8 and codes.size and codes.max() >> form.bits:
                    info = self._present(matrix, _WEIGHT)
                    raise CheckpointError(
                        f"{info.file}: tensor {info.name} should hold integers of {form.bits} bits "
                        f"by config.json, found {stored.min()} to {stored.max()}"
                    )
            case _:
                codes = stored
        return codes[:rows, :columns]

    def _scales(self, matrix: str) -> np.ndarray:
        """Read a matrix's scales: float32 [blocks along outputs, along inputs]."""
        form = self.formats[matrix]
        names = _NAMES[form.layout]
        stored = self._read_named(matrix, names.scales)
        if names.divisor is None:
            scales = stored.astype(np.float32)
            if not np.isfinite(scales).all():
                info = self._present(matrix, names.scales)
                raise CheckpointError(
                    f"{info.file}: tensor {info.name} should be finite, found NaN or infinity; "
                    "quantize the original again"
                )
            by_input = form.layout in ("gptq", "awq")
            return scales.T if by_input else scales.reshape(self._grid(matrix, form))
        divisor = self._read_named(matrix, names.divisor).reshape(())
        if not (np.isfinite(divisor) and divisor > 0):
            info = self._present(matrix, names.divisor)
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should be above 0, found {divisor}"
            )
        return float_values(8)[stored] / divisor

    def _zero_points(self, matrix: str) -> np.ndarray:
        """Read an integer matrix's zero points: uint8 [blocks along outputs, along inputs]."""
        form = self.formats[matrix]
        grid = self._grid(matrix, form)
        info = self._part(matrix, _NAMES[form.layout].zero_points)
        if info is None:
            return np.full(grid, 1 << (form.bits - 1), np.uint8)
        stored = self._read_part(info)
        match form.layout:
            case "awq":
                return unpack_awq(stored).T[: grid[0]]
            case "gptq":
                stored = _add(stored, form.zero_point_offset, form.bits)
                return unpack(stored, form.bits).T[: grid[0]]
        if info.dtype == "I32":
            zeros = unpack(stored.T, form.bits).T[: grid[0]]
        else:
            zeros = shift(stored.reshape(grid), form.bits)
        if form.has_zero_points is False and (zeros != 1 << (form.bits - 1)).any():
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should be absent or all 0, since config.json's "
                f"quantization_config says that weights are symmetric; {INSTEAD}"
            )
        return zeros

    def read_quantized(self, matrix: str) -> QuantizedTensor:
        """Read a projection's stored codes, scales and zero points.

        Args:
            matrix: The projection's name without ".weight", one of `schemes`.

        Returns:
            The quantized tensor; its float32 scales equal the stored ones exactly. Groups larger
            than the scheme's repeat their scale and zero point.
        """
        scheme, codes = self.schemes[matrix], self._codes(matrix)
        # The stored group of the first input of each group.
        blocks = _blocks(codes.shape[1], self.formats[matrix].block[1])[:: scheme.group_size]
        return QuantizedTensor(
            scheme,
            np.ascontiguousarray(codes),
            self._scales(matrix).take(blocks, axis=1),
            self._zero_points(matrix).take(blocks, axis=1),
        )

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """As `Weights.read`; for a quantized projection (code - zero point) * scale in float32."""
        matrix = name.removesuffix(".weight")
        form = self.formats.get(matrix)
        if form is None:
            return super().read(name, rows)
        height, width = form.block
        codes = self._codes(matrix)
        row_blocks = _blocks(len(codes), height)[rows]
        blocks = self._orders.get(matrix, _blocks(codes.shape[1], width))
        codes = codes[rows]
        if form.kind == "float":
            values = float_values(form.bits)[codes]
        else:
            values = codes.astype(np.float32)
            values -= self._zero_points(matrix)[row_blocks].take(blocks, axis=1)
        values *= self._scales(matrix)[row_blocks].take(blocks, axis=1)
        return values


def _add(words: np.ndarray, offset: int, bits: int) -> np.ndarray:
    """Add a number to all codes of int32 words, as GPTQModel does: to each word as one number.

    So a code that overflows carries into the next one. GPTQModel subtracts in the same way when it
    writes, and a zero point of 0 borrows one from the next.
    """
    ones = np.uint32(0xFFFFFFFF // ((1 << bits) - 1))
    return np.ascontiguousarray(words).view(np.uint32) + ones * np.uint32(offset)


def _blocks(count: int, size: int | None) -> np.ndarray:
    """The block index of each of `count` rows or columns: int [count]."""
    return np.arange(count) // (size or max(count, 1))


def find_stored(spec: ModelSpec) -> StoredQuantization | None:
    """The quantization that embedport can read itself; None if there is none."""
    quantization = spec.quantization
    return quantization.weights if isinstance(quantization, LibraryQuantization) else quantization


def open_weights(spec: ModelSpec) -> Weights:
    """Open the weights of a checkpoint, quantized or not.

    Raises:
        CheckpointError: As for `Weights` and `StoredWeights`; or only the library that quantized
            the checkpoint can read its weights.
    """
    check_readable(spec)
    return open_floats(spec) if spec.quantization is None else StoredWeights(spec)


def check_readable(spec: ModelSpec) -> None:
    """Check that a checkpoint's weights can be read without the library that quantized it.

    Raises:
        CheckpointError: They cannot.
    """
    if spec.quantization is not None and find_stored(spec) is None:
        raise CheckpointError(
            f"{spec.source.folder}: a checkpoint by {spec.quantization.method} gives no weights "
            f"to export; {INSTEAD}"
        )


def warn_of_activations(spec: ModelSpec) -> None:
    """Warn if only weights are read, but the checkpoint's own library also rounds activations."""
    stored = find_stored(spec)
    if stored is not None and stored.rounds_activations:
        logger.warning(
            "%s: weights unpacked: the checkpoint's own library (%s) rounds activations too, which "
            "is not done here; results differ from its own by that rounding",
            spec.source.folder,
            stored.method,
        )
