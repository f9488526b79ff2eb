"""A checkpoint on a CUDA device without padding: a batch's texts are concatenated (varlen).

Matrices that read the same input are concatenated. Each step between matrices is one kernel
(triton_kernels.py). The residual stream is fp32. After the last attention, only each text's last
token is computed. Quantized matrices are multiplied as stored (packed/); for fp8 and int8, each
token is rounded with a scale of its own.

Launches cost more than the work of small batches, so sizes that repeat become CUDA graphs. Sizes
are rounded up for that; the extra tokens belong to no text. Long texts attend one at a time,
through cuDNN.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from ..checkpoint.spec import ModelSpec
from ..errors import InputError
from .checkpoint import ATTENTION_CHOICE
from .packed.matrices import Matrix
from .packed.reading import STACKS, Checkpoint
from .triton_kernels import add_norm, norm_rope, power_of_two, round_rows, silu_mul

logger = logging.getLogger(__name__)

# A batch of more tokens keeps the GPU busy longer than its launches take, and needs no CUDA graph.
GRAPH_TOKENS = 4096
# A size's first batch runs directly and compiles its kernels; the second one is captured.
REPEATS, MAX_GRAPHS = 2, 64
# A text of more tokens attends through cuDNN, with its length rounded up to LONG_STEP: making the
# plan for a new length takes as long as a few batches (docs/gpu.md). LONG_TEXT must not be below
# GRAPH_TOKENS: a CUDA graph would fix the lengths of the texts it was captured with.
LONG_TEXT, LONG_STEP = GRAPH_TOKENS, 512
# The first compute capability where cuDNN was measured to be faster: Hopper.
LONG_CAPABILITY = (9, 0)
# FlashAttention is the fallback where cuDNN does not support the shapes.
LONG_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# A batch that runs directly is rounded up to this many tokens, so that kernels compiled for one
# size serve all.
ALIGNMENT = 16
# Later versions of torch require this argument for grouped-query attention.
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters

# (tokens, texts, tokens of the longest text), each rounded up.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """A layer's norm gains and matrices; matrices that read the same rows are concatenated."""

    input_norm: torch.Tensor
    qkv: Matrix
    q_norm: torch.Tensor
    k_norm: torch.Tensor
    out: Matrix
    mlp_norm: torch.Tensor
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Batch:
    """Concatenated texts on the device, int32.

    Attributes:
        ids: [tokens], token ids.
        positions: [tokens], each token's position in its text.
        starts: [texts + 1], each text's first index, then the end (cu_seqlens).
        last: [texts], the index of each text's last token.
        longest: Tokens of the longest text, or more.
        alone: If any text is long: each text's slice of tokens, to attend one text at a time.
            Otherwise empty.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    last: torch.Tensor
    longest: int
    alone: Sequence[slice] = ()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph for one batch size, with its input memory, int32, and its results."""

    graph: torch.cuda.CUDAGraph
    memory: torch.Tensor
    results: torch.Tensor


class PackedLayers:
    """Qwen3's layers on a CUDA device, for batches of texts of any lengths without padding.

    Args:
        spec: The checkpoint.
        dtype: torch.float16 or torch.bfloat16, for everything that is not quantized.
        device: "cuda"; tests emulate it on a CPU.
        checkpoint: Its tensors, on `device`.
        finish: Maps float32 [texts, hidden] after the final norm to the results.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: str,
        checkpoint: Checkpoint,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._spec, self._dtype, self._device, self._finish = spec, dtype, device, finish
        self._input_dtype = checkpoint.rows
        self._table = checkpoint.read("embed_tokens.weight").to(device, dtype)
        self._layers = [
            _load_layer(f"layers.{i}", dtype, device, checkpoint) for i in range(spec.num_layers)
        ]
        self._norm = checkpoint.read("norm.weight").to(device, dtype)
        self._cos, self._sin = (table.to(device) for table in rotary_table(spec))
        self._lock = threading.Lock()
        self._seen: Counter[Size] = Counter()
        self._graphs: dict[Size, Captured] = {}
        # One batch runs at a time, and its results are copied before the next batch runs. So all
        # graphs can share one memory pool.
        self._pool: Any = None
        self._stream = torch.cuda.Stream() if device == "cuda" else None
        self._capturing = True
        self._has_long_texts = (
            device != "cuda" or torch.cuda.get_device_capability() >= LONG_CAPABILITY
        )

    def __call__(self, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Run texts.

        Args:
            ids: int64 [tokens], the texts end to end.
            lengths: int64 [texts].

        Returns:
            float32: the result of `finish` for each text's last token.

        Raises:
            InputError: A text is longer than the model has positions.
        """
        if lengths.max() > len(self._cos):
            raise InputError(
                f"a text of {lengths.max():,} tokens is longer than the model's "
                f"{len(self._cos):,} positions; cut it"
            )
        alone = attend_alone(lengths) if self._has_long_texts else ()
        size = round_sizes(len(ids), len(lengths), int(lengths.max()))
        memory = torch.from_numpy(pack(ids, lengths, size))
        with self._lock, torch.inference_mode():
            return self._replay(memory, size, alone)[: len(lengths)].cpu().numpy()

    def _replay(self, memory: torch.Tensor, size: Size, alone: Sequence[slice]) -> torch.Tensor:
        """Run a batch, as a CUDA graph if its size repeats."""
        if size in self._graphs:
            captured = self._graphs[size]
            captured.memory.copy_(memory)
            captured.graph.replay()
            return captured.results
        on_device = memory.to(self._device)
        batch = unpack(on_device, size, alone)
        if size[0] > GRAPH_TOKENS or not self._capturing or len(self._graphs) == MAX_GRAPHS:
            return self._run(batch)
        self._seen[size] += 1
        if self._seen[size] < REPEATS:
            return self._run(batch)
        try:
            self._graphs[size] = self._capture(batch, on_device)
        except RuntimeError as error:
            # After a failed capture, torch cannot begin another one.
            self._capturing = False
            logger.warning("batches run without CUDA graphs: %s", error)
            return self._run(batch)
        self._graphs[size].graph.replay()
        return self._graphs[size].results

    def _capture(self, batch: Batch, memory: torch.Tensor) -> Captured:
        # A thread's first batch sets up cuBLAS and more, which must not be captured.
        self._run(batch)
        graph = torch.cuda.CUDAGraph()
        # With a separate stream and "thread_local", other threads can keep running other models.
        options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **options):
            results = self._run(batch)
        self._pool = graph.pool()
        return Captured(graph, memory, results)

    def _run(self, batch: Batch) -> torch.Tensor:
        # Later versions of torch would always choose cuDNN, which makes a plan for every size.
        backends = LONG_BACKENDS if batch.alone else [SDPBackend.FLASH_ATTENTION]
        with ATTENTION_CHOICE, sdpa_kernel(backends, set_priority=True):
            return self._finish(self._final_states(batch))

    def _final_states(self, batch: Batch) -> torch.Tensor:
        """Each text's last hidden state after the final norm: float32 [texts, hidden]."""
        spec, dtype, eps = self._spec, self._dtype, self._spec.rms_norm_eps
        heads = (spec.num_heads, spec.num_kv_heads)
        states = functional.embedding(batch.ids, self._table).float()
        delta = None
        for layer in self._layers:
            rows = add_norm(states, delta, layer.input_norm, eps, self._input_dtype)
            qkv = layer.qkv(rows, dtype)
            gains = (layer.q_norm, layer.k_norm)
            norm_rope(qkv, *gains, self._cos, self._sin, batch.positions, heads, eps)
            attended = attend(qkv, heads, batch)
            if layer is self._layers[-1]:
                states, attended = states[batch.last], attended[batch.last]
            rows = round_rows(attended, self._input_dtype)
            delta = layer.out(rows, dtype)
            rows = add_norm(states, delta, layer.mlp_norm, eps, self._input_dtype)
            rows = silu_mul(layer.gate_up(rows, dtype), self._input_dtype)
            delta = layer.down(rows, dtype)
        return add_norm(states, delta, self._norm, eps, torch.float32).values


def attend(qkv: torch.Tensor, heads: tuple[int, int], batch: Batch) -> torch.Tensor:
    """Causal attention within each text.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim].
        heads: (heads, kv_heads).
        batch: The texts' boundaries.

    Returns:
        [tokens, heads * head_dim]; undefined for tokens that belong to no text.
    """
    if batch.alone:
        attended = qkv.new_empty(len(qkv), qkv.shape[1] * heads[0] // (heads[0] + 2 * heads[1]))
        for text in batch.alone:
            attended[text] = _attend_long(qkv[text], heads)
        return attended
    query, key, value = _split(qkv, heads)
    sizes = (batch.starts, batch.starts, batch.longest, batch.longest)
    options: dict[str, Any] = {"enable_gqa": True} if GROUPED else {}
    attended = varlen_attn(query, key, value, *sizes, window_size=(-1, 0), **options)
    assert isinstance(attended, torch.Tensor)
    return attended.reshape(len(qkv), -1)


def _attend_long(qkv: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """`attend` for one text, right-padded with zeros, which the causal mask hides from it."""
    tokens = len(qkv)
    padded = functional.pad(qkv, (0, 0, 0, _round_up(tokens, LONG_STEP) - tokens))
    q, k, v = (states.transpose(0, 1)[None] for states in _split(padded, heads))
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return attended[0, :, :tokens].transpose(0, 1).reshape(tokens, -1)


def _split(qkv: torch.Tensor, heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, [tokens, heads, head_dim] each."""
    by_head = qkv.view(len(qkv), heads[0] + 2 * heads[1], -1)
    return by_head.split([heads[0], heads[1], heads[1]], dim=1)


def attend_alone(lengths: np.ndarray) -> list[slice]:
    """Each text's slice of the tokens if any text is long; otherwise an empty list.

    Args:
        lengths: int64 [texts], of texts end to end.
    """
    if lengths.max() <= LONG_TEXT:
        return []
    ends = np.cumsum(lengths)
    return [slice(*span) for span in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def round_sizes(tokens: int, texts: int, longest: int) -> Size:
    """Round sizes up so that they repeat: by a quarter at most, or to 16; `longest` to 2^n."""
    if tokens > GRAPH_TOKENS:
        return _round_up(tokens, ALIGNMENT), texts, _next_power(longest)
    return _next_eighth(tokens), _next_eighth(texts), _next_power(longest)


def pack(ids: np.ndarray, lengths: np.ndarray, size: Size) -> np.ndarray:
    """Pack the arrays of a `Batch` into one array.

    Args:
        ids: int64 [tokens], the texts end to end.
        lengths: int64 [texts].
        size: From `round_sizes`, T tokens and B texts.

    Returns:
        int32 [2 T + 2 B + 1]: ids [T], positions [T], starts [B + 1] and last tokens [B].
    """
    tokens, texts, _ = size
    ends = np.cumsum(lengths)
    values = np.zeros(2 * tokens + 2 * texts + 1, np.int32)
    positions, starts, last = np.split(values[tokens:], [tokens, tokens + texts + 1])
    values[: len(ids)] = ids
    positions[: len(ids)] = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    starts[1:] = len(ids)  # the extra texts are empty
    starts[1 : len(ends) + 1] = ends
    last[: len(ends)] = ends - 1
    return values


def unpack(memory: torch.Tensor, size: Size, alone: Sequence[slice]) -> Batch:
    """The `Batch` of views into what `pack` made, int32 [2 T + 2 B + 1] on a device."""
    tokens, texts, longest = size
    parts = memory.split([tokens, tokens, texts + 1, texts])
    return Batch(*parts, longest, alone)


def rotary_table(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines for the rotary embedding: float32 [positions, head_dim / 2] each.

    The angle of position p and pair i is p times the frequency of pair i (arXiv:2104.09864).
    """
    frequencies = torch.from_numpy(spec.rope.frequencies(spec.head_dim)).double()
    positions = torch.arange(spec.max_position_embeddings, dtype=torch.float64)
    angles, factor = positions[:, None] * frequencies, spec.rope.attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _load_layer(prefix: str, dtype: torch.dtype, device: str, checkpoint: Checkpoint) -> Layer:
    def gain(name: str) -> torch.Tensor:
        return checkpoint.read(f"{prefix}.{name}.weight").to(device, dtype)

    qkv, out, gate_up, down = (
        checkpoint.stacked([f"{prefix}.{name}" for name in names]) for names in STACKS
    )
    return Layer(
        gain("input_layernorm"),
        qkv,
        gain("self_attn.q_norm"),
        gain("self_attn.k_norm"),
        out,
        gain("post_attention_layernorm"),
        gate_up,
        down,
    )


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _next_power(value: int) -> int:
    """The next power of two, at least 16."""
    return max(ALIGNMENT, power_of_two(value))


def _next_eighth(value: int) -> int:
    """The next multiple of max(16, `_next_power(value)` / 8)."""
    return _round_up(value, max(ALIGNMENT, _next_power(value) // 8))
