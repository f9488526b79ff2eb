"""8-bit matrices on a CPU that round each token's activations to 8 bits, too.

As in compressed-tensors, both are int8 or float8_e4m3fn, with one scale per output row and one per
token. The shape of a batch must not change an activation's last bit: in a token's largest value, or
in a value half-way between two codes, that changes the token's codes. So attention, whose sums
depend on the padding, runs in fp64, and the rest in fp32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# The largest magnitude that a token's scale maps to: of int8, half of the range's 255 steps.
LARGEST = {torch.int8: 127.5, torch.float8_e4m3fn: 448.0}
TINY = torch.finfo(torch.float32).tiny
# Projections whose results, and so attention, are in fp64.
ATTENDS = ("q_proj", "k_proj", "v_proj")


class RoundedLinear(nn.Module):
    """x -> round(x) W^T + bias.

    With int8, products are sums of integers and exact below 2^24, in any batch.

    Args:
        weight: int8 or float8_e4m3fn [out, in].
        scales: float32 [out].
        bias: float32 [out], or None.
        dtype: The dtype of its results.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = nn.Buffer(weight, persistent=False)
        self.scales = nn.Buffer(scales, persistent=False)
        self.bias = None if bias is None else nn.Buffer(bias, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Round and multiply: [..., in], rounded to float32 first, to [..., out] in `dtype`."""
        x = x.float()
        steps = x.abs().amax(-1, keepdim=True) / LARGEST[self.weight.dtype]
        steps = steps.clamp(min=TINY)
        if self.weight.dtype == torch.int8:
            codes = (x / steps).round().clamp(-128, 127)
            products = functional.linear(codes, self.weight.float()) * steps * self.scales
        else:  # scaled first, as compressed-tensors does: these sums are not exact anyway
            codes = (x / steps).clamp(-448, 448).to(self.weight.dtype).float()
            products = functional.linear(codes * steps, self.weight.float() * self.scales[:, None])
        return (products if self.bias is None else products + self.bias).to(self.dtype)


def round_projections(
    model: nn.Module,
    read: Callable[[str], torch.Tensor],
    read_scales: Callable[[str], torch.Tensor],
) -> None:
    """Replace a model's matrices.

    Args:
        model: A Qwen3Model; its matrices may be on device "meta".
        read: Reads a tensor by its name, as it is stored.
        read_scales: Reads a matrix's scales [out, 1].
    """
    matrices = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in matrices:
        has_bias = model.get_submodule(name).bias is not None
        bias = read(f"{name}.bias").float() if has_bias else None
        scales = read_scales(name).float().flatten()
        dtype = torch.float64 if name.endswith(ATTENDS) else torch.float32
        model.set_submodule(name, RoundedLinear(read(f"{name}.weight"), scales, bias, dtype))
