"""Save a graph with its weights, and further graphs over the same weights."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from ...errors import EmbedportError
from ..provenance import Progress


def save_graph(model: ir.Model, path: Path, data: str, progress: Progress) -> None:
    """Save a graph and its weights, which are read and converted one after another.

    Args:
        model: The graph.
        path: Its file, in a folder that is created.
        data: Name of the file with the weights, beside it.
        progress: Called with ("write", done, total).

    Raises:
        EmbedportError: A tensor cannot be read or converted.
    """
    path.parent.mkdir()
    try:
        ir.save(
            model,
            path,
            external_data=data,
            max_workers=2,  # one converts a tensor while the other's goes to the disk
            callback=lambda tensor, info: progress("write", info.index + 1, info.total),
        )
    except ir.serde.SerdeError as error:
        # Small tensors are read while the graph is serialized, and onnx-ir wraps what that raises.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, EmbedportError):
            cause = cause.__cause__
        raise cause or error from None


def save_over_weights(model: ir.Model, saved: Path, path: Path) -> None:
    """Save a graph over the weights of another one.

    Args:
        model: The graph; its weights are some of the other's.
        saved: The other graph, with its weights beside it.
        path: The file to write, in the same folder.
    """
    weights = ir.load(saved).graph.initializers
    for name, value in model.graph.initializers.items():
        # Constants keep their values: they are small, and numbered differently.
        if isinstance(value.const_value, ir.LazyTensor):
            value.const_value = weights[name].const_value
    ir.save(model, path)
