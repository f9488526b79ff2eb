"""The student: a Qwen3 model of transformers, with a shared prompt run once for a whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from embedport.demo.synthetic import Geometry, write_checkpoint

# Vocabulary and three layers of 256: 3.3 M parameters, 6.7 MB in bf16.
CHUNK = 64
# Gain of queries and keys at which attention is nearly uniform.
GENTLE = 0.4
GEOMETRY = Geometry(256, 3, 4, 2, 64, 512, max_position_embeddings=4096)


def make_model(table: np.ndarray, seed: int, num_layers: int = GEOMETRY.num_layers) -> Qwen3Model:
    """The model before training: a text's vector is about the mean of its tokens' vectors.

    Args:
        table: float32 [vocab_size, hidden], each token's first vector.
        seed: Of everything else.
        num_layers: Of the model.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(table),
        hidden_size=GEOMETRY.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=GEOMETRY.num_heads,
        num_key_value_heads=GEOMETRY.num_kv_heads,
        head_dim=GEOMETRY.head_dim,
        intermediate_size=GEOMETRY.intermediate_size,
        max_position_embeddings=GEOMETRY.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    model = Qwen3Model(config)
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.from_numpy(table))
        for number, layer in enumerate(model.layers):
            _average(cast(Qwen3Attention, layer.self_attn), number)
    return model


def _average(attention: Qwen3Attention, number: int) -> None:
    """Attention that looks everywhere and hands on a part of what it sees, another part a layer."""
    kv_width = GEOMETRY.num_kv_heads * GEOMETRY.head_dim
    shared = GEOMETRY.num_heads // GEOMETRY.num_kv_heads
    first = number * kv_width % GEOMETRY.hidden_size
    part = torch.eye(GEOMETRY.hidden_size)[first : first + kv_width]
    attention.v_proj.weight.copy_(part)
    heads = part.view(GEOMETRY.num_kv_heads, GEOMETRY.head_dim, -1).repeat_interleave(shared, 0)
    attention.o_proj.weight.copy_(heads.flatten(0, 1).T / shared)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(GENTLE)


def last_states(
    model: Qwen3Model, rows: Sequence[Sequence[int]], prefix: Sequence[int] = ()
) -> torch.Tensor:
    """The final state of each row's last token behind a common prefix: float32 [rows, hidden]."""
    # Rows of like length go together: a few long ones would make padding of the others.
    order = np.argsort([len(row) for row in rows], kind="stable")
    chunks = np.array_split(order, -(-len(order) // CHUNK))
    states = [_chunk_states(model, [rows[i] for i in chunk], prefix) for chunk in chunks]
    return torch.cat(states)[torch.from_numpy(np.argsort(order))].float()


def _chunk_states(
    model: Qwen3Model, rows: Sequence[Sequence[int]], prefix: Sequence[int]
) -> torch.Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
    cache = None
    if prefix:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prefix]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    # Padding is on the right: no real token sees it, so causal attention is all that is needed.
    states = model(ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
    return states[torch.arange(len(rows)), lengths - 1]


def common_prefix(rows: Sequence[list[int]]) -> list[int]:
    """The token ids that all rows begin with."""
    first, last = min(rows), max(rows)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in same]


def load_model(folder: Path) -> Qwen3Model:
    """A checkpoint that `save_model` wrote, in fp32."""
    return Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()


def save_model(model: Qwen3Model, folder: Path, tokenizer: Tokenizer) -> None:
    """Write a bf16 checkpoint in the hub's layout."""
    write_checkpoint(folder, GEOMETRY, "embedding", tokenizer)  # its weights are replaced
    tensors = {
        name: value.detach().numpy().astype(ml_dtypes.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
