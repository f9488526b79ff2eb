"""A checkpoint run by sentence-transformers, called as its users call it.

A folder with modules.json declares a pipeline for this library: `SentenceTransformer`, by
`encode_query`, `encode_document` and `encode`; or `CrossEncoder`, by `predict`. A classifier is a
CrossEncoder's too. Prompts, chat template, pooling, heads and activations are the library's reading
of the folder, and token ids are taken from where it hands them to its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..demo.samples import Pair, Sample
from ..errors import CheckpointError, require
from ..files import read_json
from ..spec import ModelSpec
from .live import LiveReference, choose_dtype, no_loading_bar, place
from .reference import Arithmetic, Inputs

# Tokenized at once, to learn their ids.
CHUNK = 256
CLASSIFIER = "Qwen3ForSequenceClassification"


def is_library_model(spec: ModelSpec) -> bool:
    """Whether a checkpoint is made for sentence-transformers."""
    if (spec.source.pipeline / "modules.json").is_file():
        return True
    if spec.adapter is not None and spec.adapter.labels is not None:
        return True
    config = read_json(spec.source.folder / "config.json")
    return CLASSIFIER in (config.get("architectures") or [])


class _TokenizedError(Exception):
    """Ends a call of the library when its tokens are known."""


class LibraryReference(LiveReference):
    """A checkpoint in sentence-transformers."""

    library = "sentence-transformers"
    packages = ("sentence-transformers", "torch", "transformers")

    @cached_property
    def tokenizing(self) -> Any:
        """The model without weights, for all that happens before they are needed."""
        return self._open({"device_map": "meta"})

    @property
    def limit(self) -> int:
        """Tokens after which an input is cut: as asked, or the library's."""
        return self.tokenizing.max_seq_length or self.spec.max_position_embeddings

    def gives_log_odds(self) -> bool:
        """Whether `predict` gives what a sigmoid makes a probability of."""
        if self.spec.task == "embedding" or self.tokenizing.num_labels > 1:
            return False
        return type(self.tokenizing.activation_fn).__name__ == "Identity"

    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """Token ids where the library hands them to its model."""
        model, seen = self.tokenizing, {}
        preprocess = model.preprocess

        def watched(batch: Sequence[Any], *args: Any, **options: Any) -> Any:
            features = preprocess(batch, *args, **options)
            for given, ids, mask in zip(
                batch, features["input_ids"], features["attention_mask"], strict=True
            ):
                seen[given] = ids[mask.bool()].tolist()
            return features

        def stop(*_: Any) -> None:
            raise _TokenizedError

        rows: list[list[int]] = [[] for _ in inputs]
        model.preprocess = watched
        hook = model.register_forward_pre_hook(stop)
        try:
            for group in self.groups(inputs):
                for start in range(0, len(group), CHUNK):
                    numbers = group[start : start + CHUNK]
                    batch: Any = [inputs[i] for i in numbers]
                    try:
                        _call(model, batch)
                    except _TokenizedError:
                        for i in numbers:
                            rows[i] = seen[_content(inputs[i])]
                    seen.clear()
        except Exception as error:
            raise self._failed("cannot tokenize these inputs", error) from error
        finally:
            hook.remove()
            model.preprocess = preprocess
        return rows

    def groups(self, inputs: Inputs) -> Iterable[list[int]]:
        """Inputs of one prompt: a call has one; one alone where transformers takes no batch."""
        if self.spec.score_rows is not None and self.spec.inputs.skipped_token is None:
            return [[i] for i in range(len(inputs))]  # a classifier without pad_token_id
        groups: dict[Any, list[int]] = {}
        for i, each in enumerate(inputs):
            groups.setdefault(each.prompt if isinstance(each, Sample) else None, []).append(i)
        return groups.values()

    def load(self, arithmetic: Arithmetic) -> Any:
        """The model as sentence-transformers loads it: see `LiveReference`."""
        model = self._open({"dtype": choose_dtype(self.spec, arithmetic)}, device="cpu")
        model[0].model = self.adapted(model[0].model, arithmetic)
        return place(model, self.spec, arithmetic, self.device)

    def answer(self, model: Any, inputs: Inputs, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """A batch's vectors or probabilities: see `LiveReference`."""
        found = np.asarray(_call(model, inputs), np.float32)
        if self.spec.task == "embedding":
            return found
        if found.ndim == 2:  # no and yes
            found = found[:, 1] - found[:, 0]
            return _sigmoid(found)
        return _sigmoid(found) if self.origin.log_odds else found

    def layers_of(self, model: Any) -> Any:
        """The module with `embed_tokens` and `layers`."""
        return model.transformers_model.base_model

    def _open(self, options: dict[str, Any], **places: Any) -> Any:
        library = require("sentence_transformers", "torch")
        kind = (
            library.SentenceTransformer if self.spec.task == "embedding" else library.CrossEncoder
        )
        try:
            with no_loading_bar():
                model = kind(
                    str(self.folder),
                    local_files_only=True,
                    trust_remote_code=False,
                    model_kwargs={"use_safetensors": True, **options},
                    **places,
                )
        except Exception as error:
            raise self._failed("cannot open it", error) from error
        if self.max_length is not None:
            model.max_seq_length = self.max_length
        return model

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {self.library} {what}: {type(error).__name__}: {error}"
        )


def _call(model: Any, inputs: Inputs) -> Any:
    """Run the library on inputs of one prompt, as one batch."""
    options: dict[str, Any] = {"batch_size": len(inputs), "show_progress_bar": False}
    if isinstance(inputs[0], Pair):
        return model.predict([_content(each) for each in inputs], **options)
    texts, prompt = [_content(each) for each in inputs], inputs[0].prompt
    if prompt == "query":
        return model.encode_query(texts, **options)
    if prompt == "document":
        return model.encode_document(texts, **options)
    if prompt is None:
        return model.encode(texts, **options)
    if prompt in model.prompts:
        return model.encode(texts, prompt_name=prompt, **options)
    return model.encode(texts, prompt=prompt, **options)


def _content(given: Sample | Pair) -> Any:
    """What the library is given: a text, or a pair of texts."""
    return given.text if isinstance(given, Sample) else (given.query, given.document)


def _sigmoid(values: np.ndarray) -> np.ndarray:
    return (1 / (1 + np.exp(-values.astype(np.float64)))).astype(np.float32)
