"""The student: a Qwen3 model of transformers, with a shared prompt run once for a whole batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen3Config, Qwen3Model

from embedport.demo.synthetic import Geometry, write_checkpoint
from embedport.spec import Task

# Vocabulary and three layers of 256: 3.3 M parameters, 6.7 MB in bf16.
CHUNK = 64
GEOMETRY = Geometry(256, 3, 4, 2, 64, 512, max_position_embeddings=4096)


def make_model(vocab_size: int, seed: int) -> Qwen3Model:
    """The model before training."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=GEOMETRY.hidden_size,
        num_hidden_layers=GEOMETRY.num_layers,
        num_attention_heads=GEOMETRY.num_heads,
        num_key_value_heads=GEOMETRY.num_kv_heads,
        head_dim=GEOMETRY.head_dim,
        intermediate_size=GEOMETRY.intermediate_size,
        max_position_embeddings=GEOMETRY.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    return Qwen3Model(config)


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


def common_prefix(rows: Sequence[Sequence[int]]) -> list[int]:
    """The token ids that all rows begin with."""
    first, last = min(rows), max(rows)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return [token for token, _ in same]


def save_model(model: Qwen3Model, folder: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Write a bf16 checkpoint in the hub's layout."""
    write_checkpoint(folder, GEOMETRY, task, tokenizer)  # its weights are replaced
    prefix = "model." if task == "reranker" else ""
    tensors = {
        prefix + name: value.detach().numpy().astype(ml_dtypes.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
