"""Products in bf16, where the CPU has instructions for them."""

from __future__ import annotations

import torch

from embedport.machine.cpu import read_cpu


def fast_products(*, enabled: bool = True) -> torch.autocast:
    """A context in which torch multiplies matrices in bf16 if that is faster.

    Without AVX-512 BF16 torch emulates it, five times slower than fp32 (AMD Zen 3, torch 2.15).

    Args:
        enabled: Whether bf16 is precise enough.
    """
    is_fast = "avx512_bf16" in read_cpu().instructions
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled and is_fast)
