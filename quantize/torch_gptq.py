"""GPTQ and GPTAQ on a device of torch, step for step as in `gptq`.

The codes are the same as on the CPU, but for values halfway between two codes: sums are taken in
another order. Groups' ranges are searched on the CPU, by all its cores.
"""

from __future__ import annotations

import numpy as np
import torch

from ..errors import CheckpointError
from .gptq import ATTEMPTS, BLOCK, DAMPING, NOT_FINITE, NOT_INVERTIBLE
from .mse import quantize_mse
from .nf4 import BOUNDS, LEVELS
from .pairs import LARGEST, LIMIT
from .schemes import QuantizedTensor, QuantScheme


class Curvature:
    """`gptq.Curvature` on a device.

    Args:
        hessian: float32 [in, in], the mean of y y^T over inputs y.

    Raises:
        CheckpointError: The Hessian contains NaN or infinity, or cannot be inverted.
    """

    def __init__(self, hessian: torch.Tensor) -> None:
        if not hessian.isfinite().all():
            raise CheckpointError(NOT_FINITE)
        diagonal = hessian.diagonal().double()
        self.diagonal = diagonal.float()
        self.order = torch.argsort(-diagonal, stable=True)
        self.upper = _inverse_root(hessian[self.order][:, self.order].double())

    def shifted(self, weight: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
        """GPTAQ's W + W C H^-1: see `gptq.Curvature.shifted`."""
        product = (weight @ cross)[:, self.order]
        shifted = weight.clone()
        shifted[:, self.order] += (product @ self.upper.T) @ self.upper
        return shifted


def quantize_gptq(weight: torch.Tensor, inputs: Curvature, scheme: QuantScheme) -> QuantizedTensor:
    """Quantize a matrix as `gptq.quantize_gptq` does.

    Args:
        weight: float32 [out, in], on the device; for GPTAQ the shifted one.
        inputs: The second moments of its inputs, on the device.
        scheme: The quantization scheme.
    """
    columns, device = weight.shape[1], weight.device
    importance = inputs.diagonal.clamp(min=1e-12).cpu().numpy()
    base = quantize_mse(weight.cpu().numpy(), scheme, importance)
    order = inputs.order.tolist()
    size = scheme.group_size or columns
    scales = torch.from_numpy(np.ascontiguousarray(base.scales.T)).to(device)
    zeros = torch.from_numpy(np.ascontiguousarray(base.zero_points.T, np.float32)).to(device)
    bounds, levels = (torch.from_numpy(array).to(device) for array in (BOUNDS, LEVELS))
    remaining = weight.T[inputs.order].contiguous()
    codes = torch.full((columns, len(weight)), float(scheme.middle), device=device)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        block = remaining[start:end]
        errors = torch.empty_like(block)
        roots = inputs.upper[start:end, start:end]
        for i in range(end - start):
            column = order[start + i]
            scale, zero = scales[column // size], zeros[column // size]
            scaled = block[i] / scale
            if scheme.nf4:
                rounded = torch.bucketize(scaled, bounds)
                value = levels[rounded]
            else:
                rounded = torch.round(scaled) + zero
                if scheme.limits_pairs and column ^ 1 < columns:
                    partner = codes[column ^ 1] - zero
                    low = (-LIMIT - partner).clamp(min=-LARGEST) + zero
                    high = (LIMIT - partner).clamp(max=LARGEST) + zero
                    rounded = torch.minimum(torch.maximum(rounded, low), high)
                rounded = rounded.clamp(0, scheme.levels - 1)
                value = rounded - zero
            codes[column] = rounded
            errors[i] = (block[i] - value * scale) / roots[i, i]
            block[i + 1 :] -= roots[i, i + 1 :, None] * errors[i]
        remaining[end:] -= inputs.upper[start:end, end:].T @ errors
    rounded_codes = codes.T.to(torch.uint8).contiguous().cpu().numpy()
    return QuantizedTensor(scheme, rounded_codes, base.scales, base.zero_points)


def _inverse_root(hessian: torch.Tensor) -> torch.Tensor:
    """The upper triangular U with U^T U = (damped Hessian)^-1: see `gptq._inverse_root`."""
    diagonal = hessian.diagonal().clone()
    damping = DAMPING * max(float(diagonal.mean()), 1e-12)
    for _ in range(ATTEMPTS):
        hessian.diagonal().copy_(diagonal + damping)
        root, failed = torch.linalg.cholesky_ex(hessian.flip(0, 1))
        if not failed:
            identity = torch.eye(len(root), dtype=root.dtype, device=root.device)
            inverse = torch.linalg.solve_triangular(root, identity, upper=False)
            return inverse.flip(0, 1).float().contiguous()
        damping *= 10
    raise CheckpointError(NOT_INVERTIBLE)
