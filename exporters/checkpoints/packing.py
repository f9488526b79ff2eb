"""The tensors that a checkpoint stores for a quantized matrix, by the last parts of their names.

AutoGPTQ's format, version 1 (GPTQModel's checkpoint_format "gptq"): qweight int32
[in * bits / 32, out], codes packed along the inputs, the first in the lowest bits; qzeros int32
[groups, out * bits / 32], each zero point minus one; scales fp16 [groups, out]; g_idx int32 [in],
each input's group.

compressed-tensors: "pack-quantized" has weight_packed int32 [out, in * bits / 32], weight_scale
[out, groups], weight_shape int64 [2] and, if it is asymmetric, weight_zero_point int32
[out * bits / 32, groups], packed along the outputs. vLLM reads both words as unsigned codes
(scalar_types.uint4), so a value is (code - zero point) * scale.
"int-quantized" and "float-quantized" have weight int8 or float8 [out, in], weight_scale [out, 1].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ...quantize.fp8 import quantize_fp8
from ...quantize.schemes import QuantizedTensor, QuantScheme
from .methods import Plan

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Parts = dict[str, np.ndarray]


def gptq_parts(tensor: QuantizedTensor) -> Parts:
    """AutoGPTQ's four tensors of a matrix."""
    scheme = tensor.scheme
    assert scheme.group_size is not None
    zeros = (tensor.zero_points.T - np.uint8(1)) & np.uint8(scheme.levels - 1)
    groups = np.arange(tensor.codes.shape[1], dtype=np.int32) // scheme.group_size
    return {
        "qweight": pack(tensor.codes, scheme.bits).T,
        "qzeros": pack(zeros, scheme.bits),
        "scales": tensor.scales.T.astype(np.float16),
        "g_idx": groups,
    }


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack codes: uint8 [n, m] to int32 [n, m * bits / 32], the first in a word's lowest bits."""
    octets = codes
    if bits == 4:
        octets = codes[:, ::2] | codes[:, 1::2] << 4
    return np.ascontiguousarray(octets).view("<i4")


def packed_parts(tensor: QuantizedTensor) -> Parts:
    """compressed-tensors' "pack-quantized"."""
    parts = {
        "weight_packed": pack(tensor.codes, tensor.scheme.bits),
        "weight_scale": _stored_scales(tensor),
        "weight_shape": np.array(tensor.codes.shape, np.int64),
    }
    if not tensor.scheme.symmetric:
        parts["weight_zero_point"] = pack(tensor.zero_points.T, tensor.scheme.bits).T
    return parts


def int8_parts(tensor: QuantizedTensor) -> Parts:
    """compressed-tensors' "int-quantized"."""
    return {"weight": tensor.signed_codes(), "weight_scale": _stored_scales(tensor)}


def fp8_parts(weight: np.ndarray, scheme: QuantScheme) -> Parts:
    """compressed-tensors' "float-quantized", from float32 [out, in]."""
    values, scales = quantize_fp8(weight, scheme)
    return {"weight": values, "weight_scale": scales.astype(scheme.scale_dtype)}


def bitsandbytes_parts(weight: np.ndarray, plan: Plan) -> Parts:
    """Quantize a 16-bit matrix [out, in] with bitsandbytes itself, as transformers stores it."""
    import torch
    from bitsandbytes.functional import quantize_4bit
    from bitsandbytes.nn import Int8Params

    # torch does not take numpy arrays of bfloat16; the bits are the same.
    bits = torch.from_numpy(np.ascontiguousarray(weight).view(np.int16))
    values = bits.view(getattr(torch, plan.dtype))
    if plan.name == "bnb-int8":
        int8 = Int8Params(values, requires_grad=False).cpu()
        return {
            "weight": int8.data.numpy(),
            "SCB": int8.SCB.numpy(),
            # 0: rows in order, which every loader reads.
            "weight_format": np.array(0, np.uint8),
        }
    data, state = quantize_4bit(values, quant_type="nf4", compress_statistics=plan.double_quant)
    return _nf4_parts(data.numpy(), state)


def nf4_parts(tensor: QuantizedTensor, plan: Plan) -> Parts:
    """The same layout of codes and scales that are given."""
    import torch
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_blockwise

    state = QuantState(
        torch.from_numpy(tensor.scales.ravel()),
        torch.Size(tensor.codes.shape),
        get_4bit_type("nf4", "cpu"),
        tensor.scheme.group_size,
        "nf4",
        getattr(torch, plan.dtype),
    )
    if plan.double_quant:
        state.offset = state.absmax.mean()
        state.absmax, state.state2 = quantize_blockwise(state.absmax - state.offset, blocksize=256)
        state.nested = True
    return _nf4_parts((tensor.codes[:, ::2] << 4 | tensor.codes[:, 1::2]).reshape(-1, 1), state)


def _nf4_parts(data: np.ndarray, state: QuantState) -> Parts:
    tensors = state.as_dict(packed=True)
    return {"weight": data} | {f"weight.{k}": v.numpy() for k, v in tensors.items()}


def _stored_scales(tensor: QuantizedTensor) -> np.ndarray:
    return tensor.scales.astype(tensor.scheme.scale_dtype)
