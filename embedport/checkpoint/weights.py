"""Lazy, memory-mapped access to a checkpoint's safetensors.

Each read maps the shard, copies the requested rows and unmaps it, so only the rows that the caller
keeps stay in memory. Both naming schemes are read: `Qwen3Model` ("layers.0…", embedders) and
`Qwen3ForCausalLM` ("model.layers.0…", rerankers).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from .quantization_config import INSTEAD
from .spec import ModelSpec
from .tensor_files import TensorInfo, find_tensor, open_holding, read_headers

logger = logging.getLogger(__name__)

# Tensors that checkpoints hold beside what runs: a head that an embedder does not use, and the
# frequencies of old transformers.
SPARE = ("lm_head.weight", "score.weight", "rotary_emb.inv_freq")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


class Weights:
    """A checkpoint's tensors by their `Qwen3Model` names; checked against the spec when opened.

    Opened whole, it warns of tensors that no layer reads: transformers leaves them out too.

    Args:
        spec: The checkpoint's spec.
        names: The required tensors of `spec.tensor_shapes()`; all of them by default.

    Raises:
        CheckpointError: A shard is missing or truncated; or a tensor is missing, has the wrong
            shape, or a dtype other than bf16, fp16 and fp32.
    """

    # Plain weights are not rotated, so outputs need no rotation back: see quantize.source.
    output_rotation: np.ndarray | None = None

    def __init__(self, spec: ModelSpec, names: Iterable[str] | None = None) -> None:
        self.spec = spec
        shapes = spec.tensor_shapes()
        tensors = read_headers(spec.source.folder)
        self.tensors: dict[str, TensorInfo] = {}
        for name in shapes if names is None else names:
            shape = shapes[name]
            info = self._find(name, tensors)
            if info is None:
                raise CheckpointError(
                    f"{spec.source.folder}: tensor {name} (or model.{name}) of shape {list(shape)} "
                    f"is missing from {', '.join(sorted({t.file.name for t in tensors.values()}))}"
                    f"{_hint(name, tensors)}"
                )
            self._check_tensor(info, shape)
            self.tensors[name] = info
        if names is None and spec.quantization is None:
            read = {info.name for info in self.tensors.values()}
            unread = [name for name in tensors if name not in read and not name.endswith(SPARE)]
            _warn_of_unread(spec.source.folder, tuple(sorted(unread)))

    def _find(self, name: str, headers: dict[str, TensorInfo]) -> TensorInfo | None:
        return find_tensor(headers, name)

    def _check_tensor(self, info: TensorInfo, shape: tuple[int, ...]) -> None:
        if info.dtype not in DTYPES:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should be {', '.join(DTYPES)}, found "
                f"{info.dtype}: weights in fewer bits are read only as config.json's "
                f"quantization_config declares them; {INSTEAD}"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{info.file}: tensor {info.name} should have shape {list(shape)} by "
                f"config.json, found {list(info.shape)}"
            )

    @property
    def files(self) -> list[Path]:
        """The shards that hold the tensors, sorted by name."""
        return sorted({info.file for info in self.tensors.values()})

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Copy a tensor, or a range of its rows, out of its shard.

        Returns:
            An array of the stored dtype (bfloat16 is `ml_dtypes.bfloat16`) and shape.

        Raises:
            CheckpointError: The shard was replaced meanwhile, or cannot be read any more.
        """
        info = self.tensors[name]
        with open_holding(info) as shard:
            return shard.get_slice(info.name)[rows]

    def read_fp32(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Like `read`, converted to float32, which represents all three stored dtypes exactly."""
        return self.read(name, rows).astype(np.float32)

    def answer_row(self, yes: int, no: int | None) -> np.ndarray:
        """The row W_yes - W_no of a reranker's head (the embedding table if the head is tied).

        One row suffices: the softmax over two logits is the sigmoid of their difference.

        Args:
            yes: Token id of "yes".
            no: Token id of "no"; None if the score is the logit of `yes` alone.

        Returns:
            float32 [hidden].

        Raises:
            CheckpointError: The head has no row for one of the ids.
        """
        spec = self.spec
        if spec.score_rows is not None:
            rows = self.read_fp32("score.weight")
            return rows[-1] - rows[0] if spec.score_rows == 2 else rows[0]
        rows = self.tensors[spec.head].shape[0]
        if max(yes, -1 if no is None else no) >= rows:
            raise CheckpointError(
                f"{self.tensors[spec.head].file}: tensor {spec.head} should have rows for the "
                f"answer tokens {yes} and {no}, found {rows} rows"
            )
        row = self.read_fp32(spec.head, slice(yes, yes + 1))[0]
        return row if no is None else row - self.read_fp32(spec.head, slice(no, no + 1))[0]


@functools.cache  # once, however often the checkpoint is opened
def _warn_of_unread(folder: Path, names: tuple[str, ...]) -> None:
    if names:
        more = f" and {len(names) - 3:,} more" if len(names) > 3 else ""
        logger.warning(
            "%s: no layer of config.json reads %s%s: without effect",
            folder,
            ", ".join(names[:3]),
            more,
        )


def _hint(name: str, headers: dict[str, TensorInfo]) -> str:
    """Why a matrix may be missing, for a message; "" if nothing tells."""
    matrix = name.removesuffix("weight")
    parts = sorted(other for other in headers if other.removeprefix("model.").startswith(matrix))
    if not parts:
        return ""
    return (
        f", which has {', '.join(parts)}: it is quantized in a form that config.json does not "
        "declare in quantization_config; give a checkpoint that does, or the original in bf16, "
        "fp16 or fp32"
    )
