"""The student: a Qwen3 model in transformers that runs a shared prompt once per batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import ml_dtypes
import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from transformers import DynamicCache, Qwen3Config, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

from embedport.checkpoint.spec import Task
from tests.synthetic import Geometry, write_checkpoint

CHUNK = 64
# Recompilations per compiled part, for inputs of other ranks and dtypes.
RECOMPILES = 32
# Norm gain of queries and keys that makes attention nearly uniform.
GENTLE = 0.4
LAYERS = 3
HEAD = 64
MAX_TOKENS = 4096


def geometry(width: int, num_layers: int = LAYERS) -> Geometry:
    """An embedder's sizes; at a width of 256 it has 6.7 MB in bf16."""
    heads = width // HEAD
    return Geometry(
        width, num_layers, heads, heads // 2, HEAD, 2 * width, max_position_embeddings=MAX_TOKENS
    )


def make_model(table: np.ndarray, seed: int, num_layers: int = LAYERS) -> Qwen3Model:
    """The initial model: a text's vector is about the mean of its tokens' vectors.

    Args:
        table: float32 [vocab_size, hidden], each token's initial vector. Its width decides all
            other sizes: see `geometry`.
        seed: Seed of all other weights.
        num_layers: Number of layers.
    """
    torch.manual_seed(seed)
    sizes = geometry(table.shape[1], num_layers)
    config = Qwen3Config(
        vocab_size=len(table),
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.num_layers,
        num_attention_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        intermediate_size=sizes.intermediate_size,
        max_position_embeddings=sizes.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
    )
    model = Qwen3Model(config)
    # On short rows its backward pass takes a third of the time of PyTorch's fused kernel.
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model.embed_tokens.weight.copy_(torch.from_numpy(table))
        for number, layer in enumerate(model.layers):
            _average(cast(Qwen3Attention, layer.self_attn), number, sizes)
    return model


def _average(attention: Qwen3Attention, number: int, sizes: Geometry) -> None:
    """Initialize attention to average a slice of the coordinates, a different one per layer."""
    kv_width = sizes.num_kv_heads * sizes.head_dim
    shared = sizes.num_heads // sizes.num_kv_heads
    first = number * kv_width % sizes.hidden_size
    part = torch.eye(sizes.hidden_size)[first : first + kv_width]
    attention.v_proj.weight.copy_(part)
    heads = part.view(sizes.num_kv_heads, sizes.head_dim, -1).repeat_interleave(shared, 0)
    attention.o_proj.weight.copy_(heads.flatten(0, 1).T / shared)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(GENTLE)


def last_states(
    model: Qwen3Model, rows: Sequence[Sequence[int]], prefix: Sequence[int] = ()
) -> torch.Tensor:
    """The final state of each row's last token after a common prefix: float32 [rows, hidden]."""
    order, states = [], []
    for chunk, final in chunk_states(model, rows, prefix):
        last = torch.tensor([len(rows[i]) - 1 for i in chunk])
        order += chunk
        states.append(final[torch.arange(len(chunk)), last])
    return torch.cat(states)[torch.from_numpy(np.argsort(order))].float()


def chunk_states(
    model: Qwen3Model, rows: Sequence[Sequence[int]], prefix: Sequence[int] = ()
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Yield final states of chunks of similar length: (row indices, [rows, longest, hidden]).

    Sorting by length avoids padding. Padding is on the right, where no real token sees it, so
    causal attention needs no mask.
    """
    order = np.argsort([len(row) for row in rows], kind="stable")
    for chunk in np.array_split(order, -(-len(order) // CHUNK)):
        ids = torch.zeros(len(chunk), max(len(rows[i]) for i in chunk), dtype=torch.long)
        for place, i in enumerate(chunk):
            ids[place, : len(rows[i])] = torch.tensor(rows[i])
        cache = None
        if prefix:
            cache = DynamicCache(config=model.config)
            # By position: transformers 5.24 renamed `past_key_values`, and any version ignores a
            # name that it does not know.
            model(torch.tensor([prefix]), None, None, cache, use_cache=True)
            cache.batch_repeat_interleave(len(chunk))
        out = model(ids, None, None, cache, use_cache=cache is not None)
        yield chunk.tolist(), out.last_hidden_state


def split_prefix(ids: Sequence[np.ndarray]) -> tuple[list[list[int]], list[int]]:
    """Split rows of token ids into (rest of each row, common prefix)."""
    rows = [row.tolist() for row in ids]
    shared = common_prefix(min(rows), max(rows))
    return [row[len(shared) :] for row in rows], shared


def common_prefix(one: Sequence[int], other: Sequence[int]) -> list[int]:
    """The longest common prefix of two sequences."""
    pairs = zip(one, other, strict=False)
    return [token for token, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]


def compile_parts(model: Qwen3Model) -> None:
    """Compile norms and MLPs: the embedder's training steps get about a tenth faster.

    Compiling needs a C++ compiler and takes 15 seconds.
    """
    for module in model.modules():
        if isinstance(module, (Qwen3RMSNorm, Qwen3MLP)):
            module.compile(dynamic=True, recompile_limit=RECOMPILES)


def load_model(folder: Path) -> Qwen3Model:
    """Load a checkpoint written by `save_model`, in fp32."""
    return Qwen3Model.from_pretrained(folder, dtype=torch.float32).eval()


def save_model(model: Qwen3Model, folder: Path, task: Task, tokenizer: Tokenizer) -> None:
    """Write a bf16 checkpoint in the hub's layout."""
    sizes = geometry(model.config.hidden_size, len(model.layers))
    write_checkpoint(folder, sizes, task, tokenizer)  # its weights are replaced
    prefix = "model." if task == "reranker" else ""
    tensors = {
        f"{prefix}{name}": value.detach().numpy().astype(ml_dtypes.bfloat16)
        for name, value in model.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
