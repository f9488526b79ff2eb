"""A reference with a LoRA adapter, merged by PEFT itself."""

from __future__ import annotations

import json
import shutil
import warnings
import weakref
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ..adapter import CONFIG, WEIGHTS, Adapter
from ..bitsandbytes_ import importing_bitsandbytes
from ..errors import CheckpointError, require
from ..files import read_json
from ..spec import CLASSIFIER, ModelSpec


class ReferenceFolder:
    """What a reference's library opens.

    The checkpoint's folder; or, of an adapter with a pipeline of its own, in the same folder or for
    a classifier, a temporary one: links to the pipeline's files and the base's weights, and the
    base's configuration with the labels that the adapter has.

    Args:
        spec: The checkpoint.

    Attributes:
        folder: The folder, there while this object lives.
    """

    def __init__(self, spec: ModelSpec) -> None:
        source = spec.source
        labels = None if spec.adapter is None else spec.adapter.labels
        self.folder: Path = source.folder
        is_whole = source.pipeline == source.folder and not (source.folder / CONFIG).exists()
        if is_whole and labels is None:
            return
        self.folder = Path(mkdtemp(prefix="embedport-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        base = [source.folder / "config.json", *source.folder.glob("*.safetensors*")]
        own = [path for path in source.pipeline.iterdir() if path.name not in (CONFIG, WEIGHTS)]
        for path in [*base, *own]:
            if not (self.folder / path.name).exists():
                (self.folder / path.name).symlink_to(path.absolute())
        if labels is not None:
            path = self.folder / "config.json"
            config = read_json(path) | {"architectures": [CLASSIFIER], "num_labels": labels}
            config.pop("id2label", None)
            path.unlink()
            path.write_text(json.dumps(config), encoding="utf-8")


def merge_adapter(model: Any, adapter: Adapter) -> Any:
    """Merge an adapter by `PeftModel.merge_and_unload`.

    PEFT finds an adapter's tensors by their names in the class that it was trained on: a bare
    Qwen3Model, or one with a head.

    Args:
        model: transformers' model of the base.
        adapter: The adapter.

    Returns:
        The same model, merged.

    Raises:
        CheckpointError: PEFT does not take it, or does not find a tensor.
    """
    has_head = hasattr(model, "lm_head") or hasattr(model, "score")
    if adapter.has_prefix == has_head:
        return _merge(model, adapter)
    if has_head:
        model.model = _merge(model.model, adapter)
        return model
    transformers, torch = require("transformers", "torch"), require("torch", "torch")
    with torch.device("meta"):
        whole = transformers.Qwen3ForCausalLM(model.config)
    whole.model = model
    # A table of its own: what the adapter does to a tied head does not come into the vectors.
    whole.lm_head.weight = torch.nn.Parameter(model.embed_tokens.weight.detach().clone())
    return _merge(whole, adapter).model


def _merge(model: Any, adapter: Adapter) -> Any:
    peft = require("peft", "torch")
    # PEFT imports bitsandbytes where it is installed.
    with importing_bitsandbytes(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            merged = peft.PeftModel.from_pretrained(model, str(adapter.folder)).merge_and_unload()
        except Exception as error:
            raise CheckpointError(
                f"{adapter.folder}: PEFT cannot merge it: {type(error).__name__}: {error}"
            ) from error
    for each in said:
        if "missing adapter keys" in str(each.message):
            raise CheckpointError(f"{adapter.folder}: PEFT says: {each.message}")
    return merged
