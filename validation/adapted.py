"""A reference with a LoRA adapter: PEFT merges it."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ..checkpoint.adapter import CONFIG, WEIGHTS, Adapter
from ..checkpoint.spec import CLASSIFIER, ModelSpec
from ..errors import CheckpointError, require
from ..links import link
from ..strict_json import read_json


def open_folder(spec: ModelSpec, owner: object) -> Path:
    """The folder that a reference's library opens.

    Usually the checkpoint's folder. A temporary folder is made for an adapter that comes with its
    own pipeline, that lies in the checkpoint's folder, or that makes a classifier. It holds links
    to the pipeline's files and to the base's weights, and the base's configuration with the
    adapter's number of labels.

    Args:
        spec: The checkpoint.
        owner: A temporary folder is there as long as this object.

    Returns:
        The checkpoint's folder, or the temporary one.
    """
    source = spec.source
    labels = None if spec.adapter is None else spec.adapter.labels
    is_whole = source.pipeline == source.folder and not (source.folder / CONFIG).exists()
    if is_whole and labels is None:
        return source.folder
    folder = Path(mkdtemp(prefix="embedport-"))
    weakref.finalize(owner, shutil.rmtree, folder, ignore_errors=True)
    base_files = [source.folder / "config.json", *source.folder.glob("*.safetensors*")]
    pipeline_files = [
        path for path in source.pipeline.iterdir() if path.name not in (CONFIG, WEIGHTS)
    ]
    for path in [*base_files, *pipeline_files]:
        if not (folder / path.name).exists():
            link(folder / path.name, path.absolute())
    if labels is not None:
        path = folder / "config.json"
        config = read_json(path) | {"architectures": [CLASSIFIER], "num_labels": labels}
        config.pop("id2label", None)
        path.unlink()
        path.write_bytes(json.dumps(config).encode())
    return folder


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """Merge an adapter with `PeftModel.merge_and_unload`.

    PEFT looks up an adapter's tensors by their names in the class that it was trained on: a bare
    Qwen3Model, or a model with a head. The model is wrapped or unwrapped to match.

    Args:
        model: The base's transformers model.
        adapter: The adapter.

    Returns:
        The same model, merged.

    Raises:
        CheckpointError: PEFT refuses the adapter, or misses one of its tensors.
    """
    has_head = hasattr(model, "lm_head") or hasattr(model, "score")
    if adapter.has_prefix == has_head:
        return _merge(model, adapter)
    if has_head:
        model.model = _merge(model.model, adapter)
        return model
    transformers, torch = require("transformers", "torch"), require("torch", "torch")
    with torch.device("meta"):
        wrapped = transformers.Qwen3ForCausalLM(model.config)
    wrapped.model = model
    # A copy: an adapter on a tied head must not change the embedding table.
    wrapped.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone())
    return _merge(wrapped, adapter).model


def _merge(model: Any, adapter: Adapter) -> Any:
    peft = require("peft", "torch")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            merged = peft.PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
        except Exception as error:
            raise CheckpointError(
                f"{adapter.folder}: PEFT cannot merge it: {type(error).__name__}: {error}"
            ) from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise CheckpointError(f"{adapter.folder}: PEFT says: {warning.message}")
    return merged
