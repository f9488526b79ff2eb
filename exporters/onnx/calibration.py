"""What fp16 cannot hold, found by running real texts through the model in fp32.

Qwen models carry massive activations: some values of the residual stream and of the SwiGLU reach
thousands of times the others (arXiv:2402.17762), beyond fp16's largest value. The texts include
openings known to do it ("importance of …", "importing …", code):
https://github.com/QwenLM/Qwen3-Embedding/issues/164

The model runs layer by layer, each layer as an ONNX graph of its own in a temporary folder, so
memory stays at one layer and the texts' hidden states, whatever the model's size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...errors import CheckpointError
from ...weights import Weights
from .builder import GraphBuilder
from .dialects import OrtDialect
from .graph import INPUTS, Design, Stream, describe_inputs, describe_layer
from .precision import FLOAT, FLOAT16, PRECISIONS, Precision
from .session import open_session
from .tensors import FP16_MAX

# Texts not tried will go beyond those tried: leave room.
HEADROOM = 4.0
LIMIT = FP16_MAX / HEADROOM
DATA = "layer.onnx_data"


def measure_activations(
    weights: Weights,
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The largest magnitude of each watched value over texts.

    Args:
        weights: The checkpoint.
        rows: Token ids, one int64 [tokens] a text.
        folder: Where a layer's graph may be written while it runs.
        advance: Called after each of the `num_layers` layers.

    Returns:
        Name to magnitude, all in fp32: "layers.3.mlp.up_proj" is a projection's output,
        "layers.3.mlp.down_proj.input" the SwiGLU's product, "layers.3.residual" and
        "layers.3.mlp.residual" the residual stream before attention and before the SwiGLU,
        and "residual" the stream at the end.

    Raises:
        CheckpointError: A value is NaN or infinite even in fp32.
    """
    design = Design(weights, OrtDialect(), PRECISIONS["fp32"])
    feeds: list[dict[str, np.ndarray]] = [
        {"input_ids": ids[None], "attention_mask": np.ones((1, len(ids)), np.int64)} for ids in rows
    ]
    states = _gather_embeddings(weights, rows)
    largest: dict[str, float] = {}
    for layer in range(weights.spec.num_layers):
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            run, probes = _layer_session(design, layer, Path(temporary))
            for i, feed in enumerate(feeds):
                stream, *found = run(feed | {"stream": states[i]})
                states[i] = stream
                for name, value in zip(probes, found, strict=True):
                    largest[name] = max(largest.get(name, 0.0), _finite(name, value, weights))
        advance()
    largest["residual"] = max(_finite("residual", np.abs(x).max(), weights) for x in states)
    return largest


def _gather_embeddings(weights: Weights, rows: Sequence[np.ndarray]) -> list[np.ndarray]:
    name = "embed_tokens.weight"
    wanted = np.unique(np.concatenate(rows))
    table = {i: weights.read_fp32(name, slice(int(i), int(i) + 1))[0] for i in wanted}
    return [np.stack([table[i] for i in ids])[None] for ids in rows]


def _layer_session(
    design: Design, layer: int, folder: Path
) -> tuple[Callable[[dict[str, np.ndarray]], list[np.ndarray]], list[str]]:
    """A layer with its pending sum added, and the names of the magnitudes it also gives."""
    g = GraphBuilder()
    ids, mask = (ir.val(n, dtype=ir.DataType.INT64, shape=("batch", "sequence")) for n in INPUTS)
    stream = ir.val("stream", dtype=FLOAT, shape=("batch", "sequence", design.spec.hidden_size))
    batch = describe_inputs(g, design, ids, mask)
    out = describe_layer(g, design, layer, Stream(stream, None), batch)
    assert out.pending is not None
    outputs = [g.op("Add", out.residual, out.pending)]
    for value in g.probes.values():
        outputs.append(g.op("ReduceMax", g.op("Abs", value), keepdims=0))
    model = g.model(
        [ids, mask, stream],
        outputs,
        opsets=design.dialect.opsets,
        ir_version=design.dialect.ir_version,
        name=f"layer_{layer}",
    )
    ir.save(model, folder / "layer.onnx", external_data=DATA)
    session = open_session(ir.load(folder / "layer.onnx"), folder, pack=True)
    return lambda feeds: session.run(None, feeds), list(g.probes)


def _finite(name: str, value: np.ndarray, weights: Weights) -> float:
    if not np.isfinite(value):
        raise CheckpointError(
            f"{weights.spec.source.folder}: {name} is {value} on real text even in fp32; "
            "the checkpoint is damaged"
        )
    return float(value)


def choose_fp16(largest: dict[str, float], num_layers: int) -> Precision:
    """The fp16 precision that keeps in fp32 whatever came within `HEADROOM` of overflowing.

    Args:
        largest: From `measure_activations`.
        num_layers: The model's.

    Raises:
        CheckpointError: Attention itself would overflow: its values have no fp32 island.
    """
    over = {name for name, value in largest.items() if value > LIMIT}
    kept = set()
    for layer in range(num_layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        if f"{attention}.v_proj" in over:
            raise CheckpointError(
                f"{attention}.v_proj reaches {largest[f'{attention}.v_proj']:.0f}, too near "
                f"fp16's {FP16_MAX:.0f} for attention; export with --precision bf16 or fp32"
            )
        kept |= over & {f"{attention}.{name}_proj" for name in "qko"}
        kept |= over & {f"{mlp}.gate_proj", f"{mlp}.up_proj"}
        # A projection that itself fits may still feed a product that does not.
        if over & {f"{mlp}.down_proj", f"{mlp}.down_proj.input"} or kept & {
            f"{mlp}.gate_proj",
            f"{mlp}.up_proj",
        }:
            kept.add(f"{mlp}.down_proj")
    stream = any(name.endswith("residual") for name in over)
    return Precision(FLOAT16, FLOAT if stream or kept else FLOAT16, frozenset(kept))
