"""The tensors of a matrix by bitsandbytes, checked: its kernels read past the end of a short one.

In 8 bits X.weight int8 [out, in] has X.SCB, a scale for each output, and X.weight_format. In NF4
X.weight is uint8 [out * in / 2, 1]; X.weight.absmax is a scale for each `blocksize` weights;
X.weight.quant_map the 16 values; X.weight.quant_state.bitsandbytes__nf4 JSON. With double
quantization absmax is uint8, an index of nested_quant_map, times nested_absmax of its block
(bitsandbytes.nn.Linear8bitLt, bitsandbytes.functional.QuantState).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..checkpoint.spec import ModelSpec
from ..checkpoint.tensor_files import TensorInfo, dtype_and_shape, find_tensor, open_holding
from ..checkpoint.weights import DTYPES
from ..errors import CheckpointError
from ..strict_json import parse_json

STATE = "quant_state.bitsandbytes__nf4"
# (dtype, shape) of a part.
Form = tuple[str, tuple[int, ...]]


def check_parts(spec: ModelSpec, precision: str, headers: Mapping[str, TensorInfo]) -> None:
    """Check the parts of each quantized matrix.

    Args:
        spec: The checkpoint.
        precision: "bnb-int8" or "bnb-nf4".
        headers: The checkpoint's tensors.

    Raises:
        CheckpointError: A part is missing or another than it should be.
    """
    for name, shape in spec.tensor_shapes().items():
        info = find_tensor(headers, name)
        if info is None or info.dtype in DTYPES:
            continue
        if precision == "bnb-int8":
            problem = _find_int8_problem(headers, name, shape)
        else:
            problem = find_problem(headers, name, shape, read_state(headers, name))
        if problem is not None:
            raise CheckpointError(
                f"{info.file}: {info.name} is not as {precision} stores it: {problem}; quantize "
                "the original again"
            )


def find_problem(
    headers: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...], state: Mapping[str, Any]
) -> str | None:
    """The first problem with an NF4 matrix's parts, in words; None if there is none.

    Args:
        headers: The checkpoint's tensors.
        name: The matrix's name, with ".weight".
        shape: (out, in).
        state: See `read_state`.
    """
    count = math.prod(shape)
    for key, value in (("quant_type", "nf4"), ("shape", list(shape))):
        if state.get(key) != value:
            return f"{key} in {name}.{STATE} should be {value!r}, found {state.get(key)!r}"
    block, nested = state.get("blocksize"), state.get("nested_blocksize")
    for key, value in (("blocksize", block), ("nested_blocksize", 1 if nested is None else nested)):
        if not isinstance(value, int) or value < 1:
            return f"{key} in {name}.{STATE} should be a number, found {value!r}"
    scales = -(-count // int(block or 1))
    expected: dict[str, Form] = {
        "": ("U8", (count // 2, 1)),
        ".quant_map": ("F32", (16,)),
        ".absmax": ("F32" if nested is None else "U8", (scales,)),
    }
    if nested is not None:
        if not isinstance(offset := state.get("nested_offset"), float):
            return f"nested_offset in {name}.{STATE} should be a number, found {offset!r}"
        expected[".nested_absmax"] = ("F32", (-(-scales // nested),))
        expected[".nested_quant_map"] = ("F32", (256,))
    return _find_difference(headers, {f"{name}{part}": form for part, form in expected.items()})


def _find_int8_problem(
    headers: Mapping[str, TensorInfo], name: str, shape: tuple[int, ...]
) -> str | None:
    matrix = name.removesuffix(".weight")
    parts: dict[str, Form] = {name: ("I8", shape), f"{matrix}.SCB": ("F32", shape[:1])}
    problem = _find_difference(headers, parts)
    layout = find_tensor(headers, f"{matrix}.weight_format")
    if problem is None and layout is not None and (code := _read(layout).item()):
        # Codes in another order, which bitsandbytes refuses and transformers does not see.
        return f"tensor {layout.name} should be 0 (rows), found {code}"
    return problem


def _find_difference(headers: Mapping[str, TensorInfo], expected: Mapping[str, Form]) -> str | None:
    for part, (dtype, size) in expected.items():
        found, shape = dtype_and_shape(headers, part)
        if (found, shape) != (dtype, size):
            words = "none" if shape is None else f"{found} of {list(shape)}"
            return f"tensor {part} should be {dtype} of {list(size)}, found {words}"
    return None


def read_state(headers: Mapping[str, TensorInfo], name: str) -> Mapping[str, Any]:
    """The JSON that describes an NF4 matrix, by its name with ".weight"; empty if there is none."""
    info = find_tensor(headers, f"{name}.{STATE}")
    if info is None:
        return {}
    try:
        state = parse_json(_read(info).tobytes().decode("utf-8", "replace"))
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _read(info: TensorInfo) -> Any:
    with open_holding(info) as shard:
        return shard.get_tensor(info.name)
