"""A checkpoint on a CUDA device without padding: texts laid end to end, each attending to itself.

Matrices that read the same input are one, what stands between them is a kernel each (fused.py), and
the residual stream is fp32. After the last attention only each text's last token is computed.
Matrices in fp8 are multiplied as they are stored, each token rounded by its own largest value.

Small batches, whose launches cost more than their work, become CUDA graphs where their size comes
back. Sizes are rounded up for that; what is too much belongs to no text. Long texts attend one by
one, through cuDNN.
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
from torch.nn.functional import ScalingType

from ..errors import InputError
from ..spec import ModelSpec
from .checkpoint import ATTENTION_CHOICE, Read
from .fused import E4M3, Rows, add_norm, norm_rope, power_of_two, silu_mul, to_fp8

logger = logging.getLogger(__name__)

# A batch beyond this keeps the GPU busy longer than its launches take.
GRAPH_TOKENS = 4096
# A size's first batch runs as it is, and compiles what has to be; the second one is captured.
REPEATS, MAX_GRAPHS = 2, 64
# A text beyond this attends through cuDNN, by a length rounded up: each length's plan takes as long
# to make as a few batches (docs/gpu.md). No less than GRAPH_TOKENS: a graph would keep its texts'.
LONG_TEXT, LONG_STEP = GRAPH_TOKENS, 512
# Where that has been measured to be worth it: Hopper.
LONG_CAPABILITY = (9, 0)
# The second where no cuDNN takes it.
LONG_BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
# Sizes of a batch that runs as it is: what kernels compiled for one of them take of all.
ALIGNMENT = 16
# Later versions of torch want to be told.
GROUPED = "enable_gqa" in inspect.signature(varlen_attn).parameters

# Tokens, texts, and tokens of the longest text, each rounded up.
Size = tuple[int, int, int]


@dataclass(frozen=True)
class Matrix:
    """weight [out, in]; scales float32 [1, out] where it is fp8."""

    weight: torch.Tensor
    scales: torch.Tensor | None

    def __call__(self, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        """The product with each row: [tokens, out] in `dtype`."""
        if self.scales is None or rows.scales is None:
            return functional.linear(rows.values, self.weight)
        return functional.scaled_mm(
            rows.values,
            self.weight.t(),
            rows.scales,
            ScalingType.RowWise,
            self.scales,
            ScalingType.RowWise,
            output_dtype=dtype,
            use_fast_accum=True,
        )


@dataclass(frozen=True)
class Layer:
    """Norms' gains and matrices of a layer; those that read the same rows are one."""

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
    """Texts end to end, on the device, int32.

    Attributes:
        ids: [tokens].
        positions: [tokens], each in its text.
        starts: [texts + 1], where each text begins, and the end.
        last: [texts], where each text's last token is.
        longest: Tokens of the longest text, or more.
        alone: Where some text is long: each text's tokens, to attend one text at a time; else none.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    starts: torch.Tensor
    last: torch.Tensor
    longest: int
    alone: Sequence[slice] = ()


@dataclass(frozen=True)
class Captured:
    """A CUDA graph of a batch's size: what it reads, int32, and what it leaves behind."""

    graph: torch.cuda.CUDAGraph
    memory: torch.Tensor
    results: torch.Tensor


class PackedLayers:
    """Qwen3's layers on a CUDA device, for texts of any lengths at once.

    Args:
        spec: The checkpoint.
        dtype: torch.float16 or torch.bfloat16, of what is not fp8.
        device: "cuda"; tests emulate it on a CPU.
        read: Its tensors, by their names in `spec.tensor_shapes()`.
        read_scales: Where its matrices are fp8: their scales, by the matrices' names, [out, 1].
        finish: float32 [texts, hidden] after the last norm, to what is wanted of it.
    """

    def __init__(
        self,
        spec: ModelSpec,
        dtype: torch.dtype,
        device: str,
        read: Read,
        read_scales: Read | None,
        finish: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._spec, self._dtype, self._device, self._finish = spec, dtype, device, finish
        self._rounded = dtype if read_scales is None else E4M3
        self._table = read("embed_tokens.weight").to(device, dtype)
        self._layers = [
            _load_layer(f"layers.{i}", dtype, device, read, read_scales)
            for i in range(spec.num_layers)
        ]
        self._norm = read("norm.weight").to(device, dtype)
        self._cos, self._sin = (each.to(device) for each in rotary_table(spec))
        self._lock = threading.Lock()
        self._seen: Counter[Size] = Counter()
        self._graphs: dict[Size, Captured] = {}
        # One batch runs at a time, and its results are read before the next one's come: all
        # graphs share their memory.
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
            float32: what `finish` gives of each text's last token.

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
        """Run a batch, as a CUDA graph where its size keeps coming back."""
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
            # What a capture that failed leaves behind lets no other one begin.
            self._capturing = False
            logger.warning("batches run without CUDA graphs: %s", error)
            return self._run(batch)
        self._graphs[size].graph.replay()
        return self._graphs[size].results

    def _capture(self, batch: Batch, memory: torch.Tensor) -> Captured:
        # What a thread's first batch sets up, cuBLAS among it, must not be captured.
        self._run(batch)
        graph = torch.cuda.CUDAGraph()
        # A stream of its own and "thread_local": other threads may go on with other models.
        options: dict[str, Any] = {"stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(graph, pool=self._pool, **options):
            results = self._run(batch)
        self._pool = graph.pool()
        return Captured(graph, memory, results)

    def _run(self, batch: Batch) -> torch.Tensor:
        # Later versions of torch would always take cuDNN, which makes a plan for every size.
        backends = LONG_BACKENDS if batch.alone else [SDPBackend.FLASH_ATTENTION]
        with ATTENTION_CHOICE, sdpa_kernel(backends, set_priority=True):
            return self._finish(self._final_states(batch))

    def _final_states(self, batch: Batch) -> torch.Tensor:
        """Each text's last token after the last norm: float32 [texts, hidden]."""
        spec, dtype, eps = self._spec, self._dtype, self._spec.rms_norm_eps
        heads = (spec.num_heads, spec.num_kv_heads)
        states = functional.embedding(batch.ids, self._table).float()
        delta = None
        for layer in self._layers:
            rows = add_norm(states, delta, layer.input_norm, eps, self._rounded)
            qkv = layer.qkv(rows, dtype)
            gains = (layer.q_norm, layer.k_norm)
            norm_rope(qkv, *gains, self._cos, self._sin, batch.positions, heads, eps)
            attended = attend(qkv, heads, batch)
            if layer is self._layers[-1]:
                states, attended = states[batch.last], attended[batch.last]
            rows = Rows(attended) if self._rounded != E4M3 else to_fp8(attended)
            delta = layer.out(rows, dtype)
            rows = add_norm(states, delta, layer.mlp_norm, eps, self._rounded)
            rows = silu_mul(layer.gate_up(rows, dtype), self._rounded)
            delta = layer.down(rows, dtype)
        return add_norm(states, delta, self._norm, eps, torch.float32).values


def attend(qkv: torch.Tensor, heads: tuple[int, int], batch: Batch) -> torch.Tensor:
    """Causal attention within each text.

    Args:
        qkv: [tokens, (heads + 2 kv_heads) * head_dim].
        heads: (heads, kv_heads).
        batch: Where texts begin.

    Returns:
        [tokens, heads * head_dim]; tokens that belong to no text are left undefined.
    """
    if batch.alone:
        found = qkv.new_empty(len(qkv), qkv.shape[1] * heads[0] // (heads[0] + 2 * heads[1]))
        for text in batch.alone:
            found[text] = _attend_long(qkv[text], heads)
        return found
    query, key, value = _split(qkv, heads)
    sizes = (batch.starts, batch.starts, batch.longest, batch.longest)
    options: dict[str, Any] = {"enable_gqa": True} if GROUPED else {}
    found = varlen_attn(query, key, value, *sizes, window_size=(-1, 0), **options)
    assert isinstance(found, torch.Tensor)
    return found.reshape(len(qkv), -1)


def _attend_long(qkv: torch.Tensor, heads: tuple[int, int]) -> torch.Tensor:
    """`attend` of one text, behind which zeros stand: later ones, which it does not see."""
    tokens = len(qkv)
    padded = functional.pad(qkv, (0, 0, 0, _up(tokens, LONG_STEP) - tokens))
    q, k, v = (each.transpose(0, 1)[None] for each in _split(padded, heads))
    found = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return found[0, :, :tokens].transpose(0, 1).reshape(tokens, -1)


def _split(qkv: torch.Tensor, heads: tuple[int, int]) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values, [tokens, heads, head_dim] each."""
    split = qkv.view(len(qkv), heads[0] + 2 * heads[1], -1)
    return split.split([heads[0], heads[1], heads[1]], dim=1)


def attend_alone(lengths: np.ndarray) -> list[slice]:
    """Each text's tokens, where some text is long; else none.

    Args:
        lengths: int64 [texts], of texts end to end.
    """
    if lengths.max() <= LONG_TEXT:
        return []
    ends = np.cumsum(lengths)
    return [slice(*each) for each in zip((ends - lengths).tolist(), ends.tolist(), strict=True)]


def round_sizes(tokens: int, texts: int, longest: int) -> Size:
    """Sizes that come back: up by a quarter at most, or to 16; the longest to a power of two."""
    if tokens > GRAPH_TOKENS:
        return _up(tokens, ALIGNMENT), texts, _power(longest)
    return _eighth(tokens), _eighth(texts), _power(longest)


def pack(ids: np.ndarray, lengths: np.ndarray, size: Size) -> np.ndarray:
    """All that a `Batch` of a size holds, end to end.

    Args:
        ids: int64 [tokens], the texts end to end.
        lengths: int64 [texts].
        size: From `round_sizes`, T tokens and B texts.

    Returns:
        int32 [2 T + 2 B + 1]: ids, positions, starts and last tokens.
    """
    tokens, texts, _ = size
    ends = np.cumsum(lengths)
    values = np.zeros(2 * tokens + 2 * texts + 1, np.int32)
    places, starts, last = np.split(values[tokens:], [tokens, tokens + texts + 1])
    values[: len(ids)] = ids
    places[: len(ids)] = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    starts[1:] = len(ids)  # texts beyond the real ones are empty
    starts[1 : len(ends) + 1] = ends
    last[: len(ends)] = ends - 1
    return values


def unpack(memory: torch.Tensor, size: Size, alone: Sequence[slice]) -> Batch:
    """What `pack` laid down, int32 [2 T + 2 B + 1] on a device, as views."""
    tokens, texts, longest = size
    parts = memory.split([tokens, tokens, texts + 1, texts])
    return Batch(*parts, longest, alone)


def rotary_table(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of every position's angles: float32 [positions, head_dim / 2].

    Position p and pair i make p times the pair's frequency (arXiv:2104.09864).
    """
    frequencies = torch.from_numpy(spec.rope.frequencies(spec.head_dim)).double()
    positions = torch.arange(spec.max_position_embeddings, dtype=torch.float64)
    angles, factor = positions[:, None] * frequencies, spec.rope.attention_factor
    return (angles.cos() * factor).float(), (angles.sin() * factor).float()


def _load_layer(
    prefix: str, dtype: torch.dtype, device: str, read: Read, read_scales: Read | None
) -> Layer:
    def gain(name: str) -> torch.Tensor:
        return read(f"{prefix}.{name}.weight").to(device, dtype)

    def matrix(*names: str) -> Matrix:
        full = [f"{prefix}.{name}" for name in names]
        weight = torch.cat([read(f"{name}.weight").to(device) for name in full])
        if read_scales is None:
            return Matrix(weight.to(dtype), None)
        scales = torch.cat([read_scales(name).to(device, torch.float32) for name in full])
        return Matrix(weight, scales.t().contiguous())

    return Layer(
        gain("input_layernorm"),
        matrix("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        gain("self_attn.q_norm"),
        gain("self_attn.k_norm"),
        matrix("self_attn.o_proj"),
        gain("post_attention_layernorm"),
        matrix("mlp.gate_proj", "mlp.up_proj"),
        matrix("mlp.down_proj"),
    )


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def _power(value: int) -> int:
    """The next power of two, 16 at least."""
    return max(ALIGNMENT, power_of_two(value))


def _eighth(value: int) -> int:
    """The next multiple of an eighth of the power of two above, of 16 at least."""
    return _up(value, max(ALIGNMENT, _power(value) // 8))
