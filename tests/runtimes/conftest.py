"""Fixtures of the runtimes' tests."""

from typing import Any

import pytest

import embedport
from tests.runtimes.kernels import instructions as instructions


@pytest.fixture(scope="module")
def embedder(exported) -> Any:
    """An embedder on the CPU; do not measure its ranges, which are kept in the shared folder."""
    return embedport.load(exported().folder, device="cpu")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where Triton's kernels run: on a CPU they are interpreted, see the conftest.py above."""
    import torch

    there = torch.cuda.is_available()
    if (request.param == "cuda") != there:
        pytest.skip(f"torch has {'a' if there else 'no'} CUDA device here")
    return request.param


@pytest.fixture
def packed(monkeypatch):
    """The module `varlen` as it is on a CPU."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("tests/gpu runs the layers themselves")
    from embedport.runtimes import varlen

    monkeypatch.setattr(varlen, "varlen_attn", attention)
    return varlen


def attention(query, key, value, starts, _, longest, __, *, window_size, enable_gqa=True):
    """FlashAttention's result, and another value for tokens of no text."""
    import torch

    assert window_size == (-1, 0)
    assert enable_gqa
    groups = query.shape[1] // key.shape[1]
    found = torch.full_like(query, 1000)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        q, k, v = (each[start:end].transpose(0, 1).float() for each in (query, key, value))
        k, v = (each.repeat_interleave(groups, dim=0) for each in (k, v))
        scores = q @ k.mT / q.shape[-1] ** 0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
        found[start:end] = (weights @ v).transpose(0, 1).to(query.dtype)
    return found
