"""Texts without padding, as on a GPU: Triton's interpreter and plain attention stand in for it."""

import numpy as np
import pytest

from embedport.hub import Source
from embedport.runtimes import torch as adapter
from embedport.runtimes.checkpoint import open_readers
from embedport.spec import read_spec

# The interpreter takes its time.
LENGTHS = (3, 1, 6)


@pytest.fixture
def packed(monkeypatch):
    """The module as it is on a CPU, where kernels are interpreted: see conftest.py."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("test_on_a_gpu runs the kernels themselves")
    from embedport.runtimes import packed

    monkeypatch.setattr(packed, "varlen_attn", attention)
    monkeypatch.setattr(packed, "GRAPH_TOKENS", 0)
    return packed


def attention(query, key, value, starts, _, longest, __, *, window_size, enable_gqa=True):
    """What FlashAttention does, and something else for tokens of no text."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    assert window_size == (-1, 0)
    found = torch.full_like(query, 1000)
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        parts = (each[start:end].transpose(0, 1) for each in (query, key, value))
        found[start:end] = scaled_dot_product_attention(
            *parts, is_causal=True, enable_gqa=enable_gqa
        ).transpose(0, 1)
    return found


def rows_of(spec):
    generator = np.random.default_rng(7)
    return [generator.integers(0, spec.vocab_size, length) for length in LENGTHS]


def run(packed, folder, task, dtype):
    """(found, expected): packed layers' vectors, and those of transformers' layers."""
    import torch

    spec = read_spec(Source("", None, folder), task)
    rows = rows_of(spec)
    read, read_scales = open_readers(spec)
    finish = torch.nn.functional.normalize
    layers = packed.PackedLayers(spec, getattr(torch, dtype), "cpu", read, read_scales, finish)
    found = layers(np.concatenate(rows), np.array(LENGTHS))
    padded = adapter.PaddedLayers(adapter.load_layers(spec, "cpu"), "cpu", finish)
    return found, padded(np.concatenate(rows), np.array(LENGTHS))


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 0.99999), ("bfloat16", 0.999)])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("geometry", ["kv1", "kv2", "kv8"])
def test_the_same_without_padding(packed, checkpoints, geometry, task, dtype, limit):
    found, expected = run(packed, checkpoints(geometry, task, dtype=dtype), task, dtype)
    assert (found * expected).sum(axis=1).min() > limit


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_fp8(packed, quantized, task):
    found, expected = run(packed, quantized("fp8", task), task, "bfloat16")
    assert (found * expected).sum(axis=1).min() > 0.99
