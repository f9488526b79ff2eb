"""Find what overflows in fp16, by running real texts through the model in fp32.

Qwen models have massive activations: some values of the residual stream and of the SwiGLU reach
thousands of times the others (arXiv:2402.17762), beyond fp16's largest value. The texts include
openings known to trigger them ("importance of …", "importing …", code):
https://github.com/QwenLM/Qwen3-Embedding/issues/164
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...checkpoint.weights import Weights
from ...errors import CheckpointError
from ..graph.ort_dialect import OrtDialect
from ..graph.precision import FLOAT, FLOAT16, PRECISIONS, Precision
from ..graph.qwen3 import Design
from ..graph.tensors import FP16_MAX
from .layerwise import Layer, embed_rows

# Other texts will exceed the magnitudes of the calibration texts.
HEADROOM = 4.0
LIMIT = FP16_MAX / HEADROOM


def measure_activations(
    weights: Weights,
    rows: Sequence[np.ndarray],
    folder: Path,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The largest magnitude of each watched value over all texts.

    Args:
        weights: The checkpoint.
        rows: Token ids, int64 [tokens] per text.
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
    states = embed_rows(weights, rows)
    largest: dict[str, float] = {}
    for number in range(weights.spec.num_layers):
        with Layer(design, number, folder) as layer:
            for i, ids in enumerate(rows):
                states[i], magnitudes = layer.run_probed(ids, states[i])
                for name, value in magnitudes.items():
                    largest[name] = max(largest.get(name, 0.0), _finite(name, value, weights))
        advance()
    largest["residual"] = max(_finite("residual", np.abs(x).max(), weights) for x in states)
    return largest


def _finite(name: str, value: np.ndarray, weights: Weights) -> float:
    if not np.isfinite(value):
        raise CheckpointError(
            f"{weights.spec.source.folder}: {name} is {value} on real text even in fp32; "
            "the checkpoint is damaged"
        )
    return float(value)


def choose_fp16(largest: dict[str, float], num_layers: int) -> Precision:
    """The fp16 precision with fp32 for all parts within a factor of `HEADROOM` of overflowing.

    Args:
        largest: From `measure_activations`.
        num_layers: The model's number of layers.

    Raises:
        CheckpointError: Attention's values would overflow: they cannot stay in fp32.
    """
    over = {name for name, value in largest.items() if value > LIMIT}
    kept = set()
    for layer in range(num_layers):
        attention, mlp = f"layers.{layer}.self_attn", f"layers.{layer}.mlp"
        if f"{attention}.v_proj" in over:
            raise CheckpointError(
                f"{attention}.v_proj reaches {largest[f'{attention}.v_proj']:.0f}, too near "
                f"fp16's {FP16_MAX:.0f} for attention; export with `precision` bf16 or fp32"
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
