"""Hidden states to vectors, in numpy: pooling and the modules after it.

The formulas are those of sentence-transformers' modules Pooling, Dense and Normalize. The ONNX
versions are in `exporters/graph/pooling.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .pipeline import Dense, Outputs
from .tensor_files import open_shard

DENSE_FILE = "model.safetensors"
# Lower bounds of a norm in torch.nn.functional.normalize, and of a token count in
# sentence-transformers' Pooling.
SHORTEST, FEWEST = 1e-12, 1e-9
FLOATS = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class DenseWeights:
    """A Dense module's tensors: weight [out, in], bias [out], residual [out, in], float32."""

    weight: np.ndarray
    bias: np.ndarray | None
    residual: np.ndarray | None


def read_dense(folder: Path, dense: Dense) -> DenseWeights:
    """Read a Dense module's tensors.

    Args:
        folder: The checkpoint's folder.
        dense: The module.

    Raises:
        CheckpointError: Its file is missing or damaged; or a tensor is missing, has the wrong
            shape, or holds NaN or infinity.
    """
    path = folder / dense.path / DENSE_FILE
    if not path.is_file():
        pickled = (path.parent / "pytorch_model.bin").exists()
        advice = "; pytorch_model.bin is pickled and is not read, convert it" if pickled else ""
        raise CheckpointError(f"{path} is missing{advice}")
    matrix = (dense.out_features, dense.in_features)
    shapes: dict[str, tuple[int, ...]] = {"linear.weight": matrix}
    if dense.bias:
        shapes["linear.bias"] = (dense.out_features,)
    if dense.residual and dense.in_features != dense.out_features:
        shapes["residual.weight"] = matrix
    tensors = {}
    with open_shard(path) as shard:
        if difference := set(shard.keys()) ^ set(shapes):
            raise CheckpointError(
                f"{path}: tensors should be {', '.join(shapes)} by its config.json; missing or "
                f"unknown: {', '.join(sorted(difference)[:3])}"
            )
        for name, shape in shapes.items():
            view = shard.get_slice(name)
            if tuple(view.get_shape()) != shape or view.get_dtype() not in FLOATS:
                raise CheckpointError(
                    f"{path}: tensor {name} should be of shape {list(shape)} in floating point, "
                    f"found {view.get_dtype()} of {view.get_shape()}"
                )
            tensors[name] = shard.get_tensor(name).astype(np.float32)
            if not np.isfinite(tensors[name]).all():
                raise CheckpointError(f"{path}: tensor {name} holds NaN or infinity")
    return DenseWeights(
        tensors["linear.weight"], tensors.get("linear.bias"), tensors.get("residual.weight")
    )


def pool(
    states: np.ndarray, attention_mask: np.ndarray, outputs: Outputs, prompt_length: int = 0
) -> np.ndarray:
    """Pool the hidden states of each text's tokens into one vector.

    Args:
        states: float32 [batch, sequence, hidden].
        attention_mask: int64 [batch, sequence], 1 at real tokens; padding may be on either side.
        outputs: The model's outputs, with the pooling modes.
        prompt_length: Tokens of the prompt, left out unless `outputs.include_prompt`.

    Returns:
        float32 [batch, hidden * poolings].
    """
    first = np.argmax(attention_mask, axis=1)[:, None]
    positions = np.arange(attention_mask.shape[1])[None] - first
    real = attention_mask != 0
    pooled = real if outputs.include_prompt else real & (positions >= prompt_length)
    return np.concatenate(
        [_POOLINGS[mode](states, pooled, positions + 1.0) for mode in outputs.pooling], axis=1
    ).astype(np.float32)


def _token(states: np.ndarray, index: np.ndarray) -> np.ndarray:
    return states[np.arange(len(states)), index]


def _cls(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _token(states, np.argmax(pooled, axis=1))


def _last(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    last = pooled.shape[1] - 1 - np.argmax(pooled[:, ::-1], axis=1)
    return _token(states, last) * pooled.any(axis=1, keepdims=True)


def _max(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return np.where(pooled[:, :, None], states, -np.inf).max(axis=1)


def _mean(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _sum(states, pooled) / np.maximum(pooled.sum(axis=1, keepdims=True), FEWEST)


def _mean_sqrt(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return _sum(states, pooled) / np.sqrt(np.maximum(pooled.sum(axis=1, keepdims=True), FEWEST))


def _weighted(states: np.ndarray, pooled: np.ndarray, weights: np.ndarray) -> np.ndarray:
    weights = (pooled * weights).astype(np.float32)
    return _sum(states, weights) / np.maximum(weights.sum(axis=1, keepdims=True), FEWEST)


def _sum(states: np.ndarray, weights: np.ndarray) -> np.ndarray:
    # States with weight zero may be padding and hold NaN: replace them, because 0 x NaN is NaN.
    return np.einsum("bsh,bs->bh", np.where(weights[:, :, None] != 0, states, 0), weights)


_POOLINGS: Mapping[str, Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]] = {
    "cls": _cls,
    "lasttoken": _last,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted,
}


class Head:
    """The modules after pooling, with their weights.

    Args:
        outputs: The model's outputs, with the modules.
        folder: The checkpoint's or artifact's folder.

    Raises:
        CheckpointError: A module's weights are missing or damaged.
    """

    def __init__(self, outputs: Outputs, folder: Path) -> None:
        self._outputs = outputs
        self._weights = {dense.path: read_dense(folder, dense) for dense in outputs.dense}

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        """Map pooled vectors, float32 [n, width], to the model's vectors, float32 [n, dim]."""
        for step in self._outputs.steps:
            if isinstance(step, Dense):
                vectors = self._multiply(step, vectors)
            else:
                lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
                vectors = vectors / np.maximum(lengths, SHORTEST)
        return vectors[:, : self._outputs.truncate]

    def _multiply(self, dense: Dense, x: np.ndarray) -> np.ndarray:
        weights = self._weights[dense.path]
        y = x @ weights.weight.T
        y = _ACTIVATIONS[dense.activation](y if weights.bias is None else y + weights.bias)
        if dense.residual:
            y = y + (x if weights.residual is None else x @ weights.residual.T)
        return y.astype(np.float32)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


_ACTIVATIONS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Identity": lambda x: x,
    "Tanh": np.tanh,
    "ReLU": lambda x: np.maximum(x, 0),
    "GELU": lambda x: x * 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float32])(x / 2**0.5)),
    "Sigmoid": _sigmoid,
    "SiLU": lambda x: x * _sigmoid(x),
}
