"""Qwen3, described once.

    input_ids, attention_mask
      -> rows rolled so that each begins with its first real token (either padding side works)
      -> embedding -> layers -> last token of each row -> final RMSNorm
      -> embedding: prefix of `dim` values, L2 norm       reranker: sigmoid((W_yes - W_no) . h)

A checkpoint with other modules behind the layers gets those instead: see `pooling`.

A layer adds the attention output, then the SwiGLU output, to the residual stream. Each addition is
fused with the norm that follows it, so a layer returns two values: the stream, and the output that
is still to be added.

With last-token pooling, the last layer drops all other tokens after its attention.

A continuation graph takes the keys and values of a shared prefix, and returns its first row's:

    input_ids, attention_mask, past, kept, short -> present, and the output as above

Source of the architecture: Qwen3 Technical Report, arXiv:2505.09388, and transformers' qwen3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from ...checkpoint.spec import ModelSpec
from ...quantize.formats import TABLE
from ...quantize.source import WeightSource
from .builder import GraphBuilder
from .dialect import (
    BOOL,
    FLOAT,
    FLOAT8,
    INT8,
    INT64,
    Activations,
    AttentionValues,
    Dialect,
    Heads,
    LayerPast,
    Positions,
    ScaledTensor,
    apply_scales,
)
from .initializers import Float8Matrix, QuantizedMatrices, QuantizedMatrix
from .masked import Sight, describe_sight
from .pooling import describe_steps, normalize, pool, shorten
from .precision import Precision
from .tensors import CheckpointTensor

INPUTS = ("input_ids", "attention_mask")
# Number of the prompt's tokens: a further input if the prompt is excluded from pooling.
PROMPT_LENGTH = "prompt_length"
PRESENT = "present"


@dataclass(frozen=True)
class Design:
    """Everything that determines a graph.

    Attributes:
        weights: The checkpoint.
        dialect: The operators to use.
        precision: Which part computes in which dtype.
        hidden: Whether to output each token's vector instead of one result per text.
        dim: Leading values of the embedding that are kept (MRL); None for all.
        head: float32 [hidden_size, 1], a reranker's W_yes - W_no; None for an embedder.
        matrices: The quantized matrices, if the precision has formats.
        shared: Whether other software reads the graph: it then outputs each token's vector and the
            text's, or a reranker's logits first.
    """

    weights: WeightSource
    dialect: Dialect
    precision: Precision
    hidden: bool = False
    dim: int | None = None
    head: np.ndarray | None = None
    matrices: QuantizedMatrices | None = None
    shared: bool = False

    @property
    def spec(self) -> ModelSpec:
        """The checkpoint's spec."""
        return self.weights.spec

    @property
    def tokens(self) -> bool:
        """Whether each token's vector is an output."""
        return self.hidden or (self.shared and self.head is None)

    @property
    def last_only(self) -> bool:
        """Whether only each row's last token is needed after the layers."""
        return not self.tokens and (self.head is not None or self.spec.outputs.last_token)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the graph's inputs."""
        excludes_prompt = self.head is None and not self.spec.outputs.include_prompt
        return (*INPUTS, PROMPT_LENGTH) if excludes_prompt and not self.tokens else INPUTS


class Stream(NamedTuple):
    """The residual stream between layers, and the output to add to it (None at the start)."""

    residual: ir.Value
    pending: ScaledTensor | None


class Past(NamedTuple):
    """A prefix that all rows of a batch share.

    Attributes:
        states: The prefix's keys and values, float32 [2 * layers, num_kv_heads, past, head_dim];
            layer i's keys are at 2i, its values at 2i + 1.
        kept: int64 [1], tokens of the first row, prefix included, to return keys and values of.
        short: bool scalar, whether the rows, or those that will continue the returned states, are
            short: see `SHORT_ROW`.
    """

    states: ir.Value
    kept: ir.Value
    short: ir.Value


class Taps(NamedTuple):
    """The values within a layer that something besides the next layer reads.

    Attributes:
        probes: The values whose magnitudes decide what stays in fp32, by name.
        inputs: Each projection's input, by the projection's name.
        states: With a past: the first row's rotated keys and its values.
    """

    probes: dict[str, ir.Value]
    inputs: dict[str, ir.Value]
    states: list[ir.Value]


class Batch(NamedTuple):
    """Values computed once for a batch: see `describe_inputs`."""

    input_ids: ir.Value
    first: ir.Value
    width: ir.Value
    even: bool
    positions: Positions
    attention: AttentionValues
    cache: tuple[ir.Value, ir.Value]
    past: Past | None
    sight: Sight | None


def build_model(design: Design, *, continues: bool = False) -> ir.Model:
    """Build the whole graph; its initializers read the checkpoint when they are written.

    Args:
        design: The graph's design.
        continues: Whether rows continue a shared prefix. The graph then has the inputs `past`,
            `kept` and `short` of `Past`, and first the output `present`: like `past`, with `kept`
            tokens.
    """
    g = design.dialect.builder()
    spec = design.spec
    inputs = text_inputs()
    prompt_length = None
    if PROMPT_LENGTH in design.inputs:
        prompt_length = ir.val(PROMPT_LENGTH, dtype=INT64, shape=(1,))
    past = None
    if continues:
        shape = (2 * spec.num_layers, spec.num_kv_heads, "past", spec.head_dim)
        states = ir.val("past", dtype=FLOAT, shape=shape)
        kept, short = ir.val("kept", dtype=INT64, shape=(1,)), ir.val("short", dtype=BOOL, shape=())
        past = Past(states, kept, short)
    batch = describe_inputs(g, design, *inputs, even=design.precision.has_groups, past=past)
    stream = embed(g, design, batch)
    states = []
    for layer in range(spec.num_layers):
        last_only = layer == spec.num_layers - 1 and design.last_only
        stream, taps = describe_layer(g, design, layer, stream, batch, last_only=last_only)
        states += taps.states
    outputs = []
    if past is not None:
        g.scope = PRESENT
        shape = (2 * spec.num_layers, spec.num_kv_heads, "kept", spec.head_dim)
        outputs.append(named(g.op("Concat", *states, axis=0), PRESENT, shape))
    outputs += describe_outputs(g, design, stream, batch, prompt_length)
    return g.model(
        [*inputs, *([] if prompt_length is None else [prompt_length]), *(past or ())],
        outputs,
        f"qwen3_{spec.task}",
    )


def text_inputs() -> list[ir.Value]:
    """The inputs `input_ids` and `attention_mask`, int64 [batch, sequence]."""
    return [ir.val(name, dtype=INT64, shape=("batch", "sequence")) for name in INPUTS]


def describe_inputs(
    g: GraphBuilder,
    design: Design,
    input_ids: ir.Value,
    attention_mask: ir.Value,
    *,
    even: bool = False,
    past: Past | None = None,
) -> Batch:
    """Compute lengths and positions from the mask, and roll rows to begin with a real token.

    Args:
        g: The graph.
        design: The graph's design.
        input_ids: int64 [batch, sequence].
        attention_mask: int64 [batch, sequence].
        even: Whether to pad rows to an even number of tokens. onnxruntime's kernels for weights in
            groups process tokens in pairs and round a leftover token differently: with an even
            number, a text's result is the same in any batch.
        past: The shared prefix, if rows continue one.
    """
    g.scope = "inputs"
    shape = g.op("Shape", input_ids, dtype=INT64)
    size = width = g.op("Gather", shape, g.constant(1), axis=0)
    if even:
        size = g.op("Add", width, g.op("Mod", width, g.constant(2)))
    arange = g.op("Range", g.constant(0), size, g.constant(1))
    skipped = design.spec.inputs.skipped_token if design.spec.inputs.cuts_skipped else None
    if skipped is None:
        count = g.op("ReduceSum", attention_mask, g.constant([1]), keepdims=1)
    else:
        count = count_to_last(g, input_ids, attention_mask, skipped)
    past_size, all_positions = None, arange
    if past is not None:
        past_size = g.op("Gather", g.op("Shape", past.states, dtype=INT64), g.constant(2), axis=0)
        all_positions = g.op("Range", g.constant(0), g.op("Add", size, past_size), g.constant(1))
    positions = Positions(
        # A row that is all padding counts as one token: its result is defined, if useless.
        lengths=g.op("Max", count, g.constant(1)),
        size=size,
        arange=arange,
        batch=g.op("Slice", shape, g.constant([0]), g.constant([1])),
        past=past_size,
        short=None if past is None else past.short,
    )
    first = g.op("ArgMax", attention_mask, dtype=INT64, axis=1, keepdims=1)
    rolled = g.op("Mod", g.op("Add", arange, first), width)
    return Batch(
        input_ids=g.op("GatherElements", input_ids, rolled, axis=1),
        first=first,
        width=width,
        even=even,
        positions=positions,
        attention=design.dialect.attention_values(g, positions, design.precision.compute),
        cache=rotary_cache(g, design, all_positions),
        past=past,
        sight=describe_sight(g, design.spec, positions),
    )


def count_to_last(
    g: GraphBuilder, input_ids: ir.Value, attention_mask: ir.Value, skipped: int
) -> ir.Value:
    """Each row's tokens up to the last that is not `skipped`: int64 [batch, 1], 0 or less if none.

    transformers' classifiers read that one. embedport cuts such tokens off; other software's
    tokenizer may append one, with a mask of 1.
    """
    is_other = g.op("Not", g.op("Equal", input_ids, g.constant(skipped), dtype=BOOL), dtype=BOOL)
    read = g.op("Mul", attention_mask, g.cast(is_other, INT64))
    size = g.op("Gather", g.op("Shape", input_ids, dtype=INT64), g.constant(1), axis=0)
    numbers = g.op("Range", g.constant(1), g.op("Add", size, g.constant(1)), g.constant(1))
    end = g.op("ReduceMax", g.op("Mul", read, numbers), g.constant([1]), keepdims=1)
    return g.op("Sub", end, g.op("ArgMax", attention_mask, dtype=INT64, axis=1, keepdims=1))


def rotary_cache(g: GraphBuilder, design: Design, arange: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Cosines and sines of positions, [positions, head_dim / 2] each.

    Computed in float32, as in the reference: RoFormer, arXiv:2104.09864, eq. 15.
    """
    rope = design.spec.rope
    frequencies = rope.frequencies(design.spec.head_dim)
    rows = g.op("Unsqueeze", g.cast(arange, FLOAT), g.constant([1]))
    angles = g.op("Mul", rows, g.constant(frequencies[None], FLOAT))
    dtype = design.precision.rotary
    cosines, sines = design.dialect.cos_sin(g, angles, design.precision.compute)
    if rope.attention_factor != 1:
        factor = g.constant(rope.attention_factor, FLOAT)
        cosines, sines = g.op("Mul", cosines, factor), g.op("Mul", sines, factor)
    return g.cast(cosines, dtype), g.cast(sines, dtype)


def embed(g: GraphBuilder, design: Design, batch: Batch) -> Stream:
    """Look up the embedding table's rows: the start of the residual stream."""
    g.scope = "embed_tokens"
    precision = design.precision
    if TABLE in precision.formats:
        rows = design.dialect.gather_table(g, batch.input_ids, quantized(design, TABLE))
    else:
        table = CheckpointTensor(f"{TABLE}.weight", design.weights, precision.dtype_of(TABLE))
        rows = g.op("Gather", g.initializer(table), batch.input_ids, axis=0)
    return Stream(g.cast(rows, precision.residual), None)


def describe_layer(
    g: GraphBuilder,
    design: Design,
    layer: int,
    stream: Stream,
    batch: Batch,
    *,
    last_only: bool = False,
) -> tuple[Stream, Taps]:
    """One decoder layer.

    Args:
        g: The graph.
        design: The graph's design.
        layer: Its number.
        stream: Residual stream and the output to add, [batch, size, hidden_size].
        batch: The batch's values.
        last_only: Whether to keep each row's last token only, [batch, 1, hidden_size].

    Returns:
        (the stream after the layer, the values within it).
    """
    prefix = f"layers.{layer}"
    g.scope = prefix
    taps = Taps({}, {}, [])
    normed, residual = add_norm(g, design, f"{prefix}.input_layernorm.weight", stream)
    taps.probes[f"{prefix}.residual"] = residual
    attended = describe_attention(g, design, layer, normed, batch, taps)
    if last_only:
        attended, residual = (last_token(g, x, batch) for x in (attended, residual))
    (projected,) = linears(g, design, [f"{prefix}.self_attn.o_proj"], Activations(attended), taps)
    stream = Stream(residual, projected)
    normed, residual = add_norm(g, design, f"{prefix}.post_attention_layernorm.weight", stream)
    taps.probes[f"{prefix}.mlp.residual"] = residual
    return Stream(residual, describe_mlp(g, design, f"{prefix}.mlp", normed, taps)), taps


def describe_attention(
    g: GraphBuilder, design: Design, layer: int, x: Activations, batch: Batch, taps: Taps
) -> ir.Value:
    """Projections, then the dialect's attention or masked attention."""
    prefix = f"layers.{layer}.self_attn"

    def gains(name: str, dtype: ir.DataType | None) -> ir.Value:
        return norm_weight(g, design, f"{prefix}.{name}_norm.weight", dtype)

    names = [f"{prefix}.{name}_proj" for name in "qkv"]
    q, k, v = linears(g, design, names, x, taps)
    heads = Heads(q.value, k.value, v, gains("q", q.value.dtype), gains("k", k.value.dtype))
    compute = design.precision.compute
    if layer in design.spec.masked_layers:
        assert batch.sight is not None
        position_ids, mask = batch.sight
        return design.dialect.plain_attention(
            g, design.spec, heads, position_ids, batch.cache, compute, mask
        )
    past = batch.past
    if past is not None:
        indices = g.constant([2 * layer, 2 * layer + 1])
        past = LayerPast(past.states, indices, past.kept)
    attended, *states = design.dialect.attention(
        g, design.spec, heads, batch.attention, batch.cache, compute, past
    )
    taps.states.extend(states)
    return attended


def describe_mlp(
    g: GraphBuilder, design: Design, prefix: str, x: Activations, taps: Taps
) -> ScaledTensor:
    """SwiGLU, arXiv:2002.05202: down(silu(gate(x)) * up(x))."""
    down = f"{prefix}.down_proj"
    dtype = design.precision.dtype_of(down)
    gate, up = linears(g, design, [f"{prefix}.gate_proj", f"{prefix}.up_proj"], x, taps)
    width = design.spec.intermediate_size
    product = design.dialect.swiglu(g, gate, up.value, width, dtype)
    taps.probes[f"{down}.input"] = product.value
    # The scales of `up` are applied later, to the narrower output of `down`.
    (out,) = linears(g, design, [down], product._replace(scales=up.scales), taps)
    return out


def linears(
    g: GraphBuilder, design: Design, names: Sequence[str], x: Activations, taps: Taps
) -> list[ScaledTensor]:
    """Multiply x by projections' matrices, each in the format that the precision gives it.

    Projections that take 8-bit activations share them.
    """
    rows = dict(x.rows)
    products = []
    for name in names:
        taps.inputs[name] = x.value
        format = design.precision.formats.get(name)
        if format is not None and format.activations:
            codes = FLOAT8 if format.float8 else INT8
            if codes not in rows:
                value = g.cast(x.value, FLOAT)
                width = design.spec.tensor_shapes()[f"{name}.weight"][1]
                rows[codes] = design.dialect.quantize_rows(g, value, width, codes)
        product = linear(g, design, name, x._replace(rows=rows), taps)
        products.append(add_bias(g, design, name, product))
    return products


def linear(g: GraphBuilder, design: Design, name: str, x: Activations, taps: Taps) -> ScaledTensor:
    """Multiply x, quantized already if the projection takes 8-bit activations, by one matrix."""
    precision, dialect = design.precision, design.dialect
    format = precision.formats.get(name)
    if format is None:
        dtype = precision.dtype_of(name)
        tensor = CheckpointTensor(f"{name}.weight", design.weights, dtype, transpose=True)
        out = ScaledTensor(g.op("MatMul", g.cast(x.value, dtype), g.initializer(tensor)), x.scales)
        taps.probes[name] = out.value
        return out
    compute = precision.compute
    if not format.activations:
        value = g.cast(x.value, compute)
        return ScaledTensor(dialect.matmul_groups(g, value, quantized(design, name)), x.scales)
    matrix = float8(design, name) if format.float8 else quantized(design, name)
    rows = x.rows[FLOAT8 if format.float8 else INT8]
    scales = rows.scales if x.scales is None else g.op("Mul", rows.scales, x.scales)
    return ScaledTensor(dialect.matmul_rows(g, rows, matrix, compute), scales)


def add_bias(g: GraphBuilder, design: Design, name: str, product: ScaledTensor) -> ScaledTensor:
    """Add a projection's bias, in a model whose attention has biases."""
    if not design.spec.attention_bias or ".self_attn." not in name:
        return product
    value = apply_scales(g, product)
    bias = CheckpointTensor(f"{name}.bias", design.weights, value.dtype or FLOAT)
    return ScaledTensor(g.op("Add", value, g.initializer(bias)))


def quantized(design: Design, name: str) -> QuantizedMatrix:
    """The initializers of a matrix that the precision quantizes to integers."""
    assert design.matrices is not None
    rows, columns = design.spec.tensor_shapes()[f"{name}.weight"]
    scheme = design.precision.formats[name].scheme
    return QuantizedMatrix(name, (rows, columns), scheme, design.matrices)


def float8(design: Design, name: str) -> Float8Matrix:
    """The initializers of a matrix that the precision rounds to float8."""
    rows, columns = design.spec.tensor_shapes()[f"{name}.weight"]
    return Float8Matrix(name, (rows, columns), design.weights)


def add_norm(
    g: GraphBuilder, design: Design, weight_name: str, stream: Stream
) -> tuple[Activations, ir.Value]:
    """Add the pending output to the stream; return (the stream's RMSNorm, the stream)."""
    dialect, eps = design.dialect, design.spec.rms_norm_eps
    weight = norm_weight(g, design, weight_name, stream.residual.dtype)
    if stream.pending is None:
        return Activations(dialect.norm(g, stream.residual, weight, eps)), stream.residual
    return dialect.add_norm(g, stream.residual, stream.pending, weight, eps)


def norm_weight(g: GraphBuilder, design: Design, name: str, dtype: ir.DataType | None) -> ir.Value:
    """An RMSNorm's gains, in the dtype of its input."""
    return g.initializer(CheckpointTensor(name, design.weights, dtype or FLOAT))


def last_token(g: GraphBuilder, x: ir.Value, batch: Batch) -> ir.Value:
    """Each row's last real token: [batch, size, n] -> [batch, 1, n]; twice if rows are even."""
    index = g.op("Sub", batch.positions.lengths, g.constant(1))
    if batch.even:
        index = g.op("Concat", index, index, axis=1)
    return g.op("GatherND", x, g.op("Unsqueeze", index, g.constant([2])), batch_dims=1)


def describe_outputs(
    g: GraphBuilder,
    design: Design,
    stream: Stream,
    batch: Batch,
    prompt_length: ir.Value | None = None,
) -> list[ir.Value]:
    """The final norm and the task's head, in fp32: the graph's outputs."""
    g.scope = "output"
    spec, outputs = design.spec, design.spec.outputs
    assert stream.pending is not None  # a model has at least one layer
    # Usually one row per text: fusing would gain nothing.
    pending = ScaledTensor(g.cast(apply_scales(g, stream.pending), FLOAT))
    stream = Stream(g.cast(stream.residual, FLOAT), pending)
    (normed, *_), _ = add_norm(g, design, "norm.weight", stream)
    plain = outputs.steps == ("normalize",) and outputs.last_token and outputs.truncate is None
    rotation = design.weights.output_rotation
    # For a reranker, the rotation is in the head instead.
    if rotation is not None and design.head is None:
        if not design.tokens and plain:
            rotation = rotation[:, : design.dim]
        matrix = ir.tensor(np.ascontiguousarray(rotation), name="output.rotation")
        normed = g.op("MatMul", normed, g.initializer(matrix))
    hidden = []
    if design.tokens:
        shape = ("batch", "sequence", spec.hidden_size)
        hidden.append(named(roll_back(g, normed, batch), "last_hidden_state", shape))
        # Without the prompt's length, which only embedport gives, there is no pooled vector.
        if design.hidden or not outputs.include_prompt:
            return hidden
    if design.last_only:
        pooled = g.op("Gather", normed, g.constant(0), axis=1)
    else:
        pooled = pool(g, normed, batch.positions, outputs, prompt_length)
    if design.head is not None:
        head = g.initializer(ir.tensor(design.head, name="score.weight"))
        return describe_score(g, design, g.op("MatMul", pooled, head))
    dim = design.dim or spec.embedding_dim
    if plain:
        # Truncated first: normalizing before that too would give the same unit vector.
        if dim < spec.hidden_size and rotation is None:
            pooled = shorten(g, pooled, dim)
        return [*hidden, named(normalize(g, pooled), "sentence_embedding", ("batch", dim))]
    vectors = describe_steps(g, pooled, outputs, spec.source.pipeline)
    if dim < spec.embedding_dim:
        vectors = shorten(g, vectors, dim)
        vectors = normalize(g, vectors) if outputs.unit_length else vectors
    return [*hidden, named(vectors, "sentence_embedding", ("batch", dim))]


def describe_score(g: GraphBuilder, design: Design, logits: ir.Value) -> list[ir.Value]:
    """A reranker's `score` [batch], and the `logits` [batch, 1] that it is computed from.

    The standard dialect's own graph has the score alone: embedport binds one output of an engine.
    """
    score = logits
    if design.spec.outputs.activation == "sigmoid":
        score = g.op("Sigmoid", score)
    score = named(g.op("Squeeze", score, g.constant([1])), "score", ("batch",))
    if not design.shared and design.dialect.name == "standard":
        return [score]
    logits = named(logits, "logits", ("batch", 1))
    return [logits, score] if design.shared else [score, logits]


def roll_back(g: GraphBuilder, x: ir.Value, batch: Batch) -> ir.Value:
    """Undo the roll: [batch, size, n] to [batch, sequence, n], tokens in the caller's order."""
    arange = g.op("Range", g.constant(0), batch.width, g.constant(1))
    index = g.op("Add", g.op("Sub", arange, batch.first), batch.width)
    index = g.op("Unsqueeze", g.op("Mod", index, batch.width), g.constant([2]))
    return g.op("GatherND", x, index, batch_dims=1)


def named(value: ir.Value, name: str, shape: tuple[str | int, ...]) -> ir.Value:
    """Give a value the name and shape of a graph output."""
    value.name = name
    value.shape = ir.Shape(shape)
    return value
