"""Run a model layer by layer with onnxruntime, before there is an artifact.

Each layer is an ONNX graph of its own in a temporary folder, with the design's operators. Memory
holds one layer and the texts' hidden states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import onnx_ir as ir

from ...checkpoint.pooling import Head, pool
from ...quantize.source import WeightSource
from ...runtimes.part_session import open_session
from ..graph.builder import GraphBuilder
from ..graph.dialect import apply_scales
from ..graph.precision import FLOAT
from ..graph.qwen3 import (
    Design,
    Stream,
    Taps,
    describe_inputs,
    describe_layer,
    embed,
    text_inputs,
)

DATA = "part.onnx_data"
# The inputs that projections share, in a layer's order: q, k, v; o; gate, up; down.
STAGES = 4
MLP_STAGE = 2
# Tokens to run at once: an MLP's states of 3,072 values take 12 KB per token.
TOKENS_AT_ONCE = 1 << 13
# Rows of the embedding table that are read at once.
BLOCK = 256


class _Part:
    """A part of the model in a session; `with` closes it and deletes its graph.

    Args:
        g: The part's nodes.
        inputs: Its inputs.
        outputs: Its outputs.
        folder: Where the graph may be written while it runs.
        name: The graph's name.
    """

    def __init__(
        self,
        g: GraphBuilder,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        folder: Path,
        name: str,
    ) -> None:
        model = g.model(inputs, outputs, name)
        _remove_unused(model.graph)
        self._temporary = tempfile.TemporaryDirectory(dir=folder)
        path = Path(self._temporary.name) / "part.onnx"
        ir.save(model, path, external_data=DATA)
        self.session: Any = open_session(ir.load(path), path.parent, pack=True, kernels=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # The variable of `with` outlives the block: else this session and the next would be open.
        del self.session
        self._temporary.cleanup()


class Layer(_Part):
    """One layer in a session.

    Args:
        design: The model.
        layer: The layer's number.
        folder: Where the graph may be written while it runs.
    """

    def __init__(self, design: Design, layer: int, folder: Path) -> None:
        described = _describe(design, layer)
        g, probes = described.g, described.taps.probes
        magnitudes = [g.op("ReduceMax", g.op("Abs", x), keepdims=0) for x in probes.values()]
        outputs = [described.out, *magnitudes]
        super().__init__(g, described.inputs, outputs, folder, f"layer_{layer}")
        self._probes = list(probes)
        self._out = described.out.name

    def run(self, ids: np.ndarray, state: np.ndarray) -> np.ndarray:
        """The residual stream after the layer: float32 [n, tokens, hidden_size], like `state`.

        Args:
            ids: int64 [tokens].
            state: The stream before the layer: n states of the same text.
        """
        at_once = max(1, TOKENS_AT_ONCE // len(ids))
        parts = [state[i : i + at_once] for i in range(0, len(state), at_once)]
        done = [self.session.run([self._out], _feeds(ids, part))[0] for part in parts]
        return done[0] if len(done) == 1 else np.concatenate(done)

    def run_probed(
        self, ids: np.ndarray, state: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Like `run`, plus the largest magnitude of each watched value, by name."""
        out, *magnitudes = self.session.run(None, _feeds(ids, state))
        return out, dict(zip(self._probes, magnitudes, strict=True))


class Segment(_Part):
    """A part of a layer, from one shared input of its projections to the next.

    The segments of a layer, run one after another, compute the layer once. So a projection can be
    replaced before anything behind it is computed.

    Args:
        design: The model.
        layer: The layer's number.
        folder: Where the graph may be written while it runs.
        stage: The input to compute, from 0, or `STAGES` for the layer's end.

    Attributes:
        names: The projections that read the input; none at the layer's end.
    """

    def __init__(self, design: Design, layer: int, folder: Path, stage: int) -> None:
        described = _describe(design, layer)
        shared = list(described.shared)
        assert len(shared) == STAGES
        at_end = stage == STAGES
        self.names = [] if at_end else described.shared[shared[stage]]
        outputs = [described.out] if at_end else [described.residual(stage), shared[stage]]
        ids, mask, stream = described.inputs
        inputs = [ids, mask, stream]
        if stage > 0:
            residual, x = described.residual(stage - 1), shared[stage - 1]
            if residual is not stream:
                inputs[2] = _replace(residual, "stream_here")
            inputs.append(_replace(x, "x"))
            outputs = [inputs[2] if value is residual else value for value in outputs]
        # A graph's input cannot be its output.
        outputs = [described.g.op("Identity", v) if v in inputs else v for v in outputs]
        name = f"layer_{layer}_segment_{stage}"
        super().__init__(described.g, inputs, outputs, folder, name)
        self._feeds = [value.name for value in inputs]

    def run(
        self, rows: Sequence[np.ndarray], states: list[np.ndarray], inputs: list[np.ndarray]
    ) -> list[np.ndarray]:
        """Run texts through the segment.

        Args:
            rows: Token ids, int64 [tokens] each.
            states: The residual stream where the segment begins, float32 [1, tokens, hidden_size]
                each; replaced in the list by the stream where it ends.
            inputs: The shared input where it begins, float32 [tokens, in] each; none at stage 0.
                Emptied text by text.

        Returns:
            The shared input where it ends, likewise; none at the layer's end.
        """
        results = []
        for i, ids in enumerate(rows):
            values = [ids[None], np.ones((1, len(ids)), np.int64), states[i]]
            values += [inputs[i][None]] if inputs else []
            states[i], *x = self.session.run(None, dict(zip(self._feeds, values, strict=True)))
            results += [x[0][0]] if x else []
            if inputs:
                inputs[i] = inputs[i][:0]
        return results


class _Described(NamedTuple):
    """A described layer: the graph, its inputs, the stream after it, and values within it.

    Attributes:
        shared: Each input of projections, to their names, in the order of the layer.
    """

    g: GraphBuilder
    prefix: str
    inputs: list[ir.Value]
    out: ir.Value
    taps: Taps
    shared: dict[ir.Value, list[str]]

    def residual(self, stage: int) -> ir.Value:
        """The residual stream where a stage's projections read."""
        part = "residual" if stage < MLP_STAGE else "mlp.residual"
        return self.taps.probes[f"{self.prefix}.{part}"]


def _describe(design: Design, layer: int) -> _Described:
    g = design.dialect.builder()
    ids, mask = text_inputs()
    stream = ir.val("stream", dtype=FLOAT, shape=("batch", "sequence", design.spec.hidden_size))
    batch = describe_inputs(g, design, ids, mask)
    out, taps = describe_layer(g, design, layer, Stream(stream, None), batch)
    assert out.pending is not None
    after = g.op("Add", out.residual, apply_scales(g, out.pending))
    shared: dict[ir.Value, list[str]] = {}
    for name, value in taps.inputs.items():
        shared.setdefault(value, []).append(name)
    return _Described(g, f"layers.{layer}", [ids, mask, stream], after, taps, shared)


def _replace(value: ir.Value, name: str) -> ir.Value:
    """Make a graph's value an input: what computed it is no longer used."""
    given = ir.Value(name=name, type=value.type, shape=value.shape)
    value.replace_all_uses_with(given)
    return given


def embed_rows(weights: WeightSource, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each text's embeddings in fp32, [1, tokens, hidden_size]; only the rows needed are kept.

    They are read in blocks: each read opens the file.
    """
    table: dict[int, np.ndarray] = {}
    needed_ids = np.unique(np.concatenate(rows)).tolist()
    for block, ids in groupby(needed_ids, key=lambda i: i // BLOCK):
        start = block * BLOCK
        end = min(start + BLOCK, weights.spec.vocab_size)
        values = weights.read_fp32("embed_tokens.weight", slice(start, end))
        table |= {i: values[i - start].copy() for i in ids}
    return [np.stack([table[i] for i in ids])[None] for ids in rows]


def embed_quantized(design: Design, rows: Sequence[np.ndarray], folder: Path) -> list[np.ndarray]:
    """Each text's embeddings from the design's own, possibly quantized, table."""
    g = design.dialect.builder()
    inputs = text_inputs()
    out = embed(g, design, describe_inputs(g, design, *inputs)).residual
    with _Part(g, inputs, [out], folder, "embed_tokens") as part:
        return [part.session.run(None, _feeds(row))[0] for row in rows]


def final_vectors(design: Design, states: Sequence[np.ndarray]) -> np.ndarray:
    """The texts' vectors, float32 [texts, dim]; a reranker's last states, [texts, hidden_size].

    They are taken after the final norm and, for an embedder, pooling over all tokens and the
    modules after it.
    """
    spec, outputs = design.spec, design.spec.outputs
    gains, rotation = design.weights.read_fp32("norm.weight"), design.weights.output_rotation
    only_last = spec.task == "reranker" or outputs.last_token
    vectors = []
    for state in states:
        pooled_states = state[:, -1:] if only_last else state
        scale = np.sqrt(np.mean(pooled_states**2, axis=2, keepdims=True) + spec.rms_norm_eps)
        normed = pooled_states / scale * gains
        normed = normed if rotation is None else normed @ rotation
        if only_last:
            vectors.append(normed[:, 0])
        else:
            vectors.append(pool(normed, np.ones(normed.shape[:2], np.int64), outputs))
    result = np.concatenate(vectors)
    return result if spec.task == "reranker" else Head(outputs, spec.source.pipeline)(result)


def _remove_unused(graph: ir.Graph) -> None:
    """Remove what no output depends on; onnx-ir's own pass removes optional outputs too."""
    wanted = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value in wanted or value.uses() for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            del graph.initializers[name]


def _feeds(ids: np.ndarray, state: np.ndarray | None = None) -> dict[str, np.ndarray]:
    rows = np.tile(ids, (1 if state is None else len(state), 1))
    feeds = {"input_ids": rows, "attention_mask": np.ones_like(rows)}
    return feeds if state is None else feeds | {"stream": state}
