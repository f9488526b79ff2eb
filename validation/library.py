"""A checkpoint run by sentence-transformers, through the calls that its users make.

A folder with modules.json declares a pipeline for this library: a `SentenceTransformer`, called
with `encode_query`, `encode_document` and `encode`, or a `CrossEncoder`, called with `predict`. A
classifier is a CrossEncoder too. The library itself reads prompts, chat template, pooling, heads
and activations from the folder; token ids are recorded where it passes them to its model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..checkpoint.spec import CLASSIFIER, ModelSpec
from ..errors import CheckpointError, require
from ..runtimes.batching import group_indices
from ..runtimes.checkpoint import no_loading_bar
from ..strict_json import read_json
from ..texts.samples import Pair, Sample
from .live import LiveReference, cast_and_move, choose_dtype
from .measures import sigmoid
from .reference import Arithmetic, Inputs
from .settings import Settings

# Inputs tokenized in one call.
CHUNK = 256


def is_library_model(spec: ModelSpec) -> bool:
    """Whether sentence-transformers opens this checkpoint."""
    if (spec.source.pipeline / "modules.json").is_file():
        return True
    if spec.adapter is not None and spec.adapter.labels is not None:
        return True
    config = read_json(spec.source.folder / "config.json")
    return CLASSIFIER in (config.get("architectures") or [])


class _TokenizedError(Exception):
    """Ends a call of the library once its tokens are recorded."""


class LibraryReference(LiveReference):
    """A checkpoint in sentence-transformers."""

    library = "sentence-transformers"
    packages = ("sentence-transformers", "torch", "transformers")

    @cached_property
    def _empty(self) -> tuple[Any, int]:
        """The model without weights, and the tokens after which it cuts of its own accord."""
        model = self._open({"device_map": "meta"})
        own_limit = model.max_seq_length or self.spec.max_position_embeddings
        return self._limited(model), own_limit

    @property
    def tokenizing(self) -> Any:
        """The model without weights, for everything that needs none."""
        return self._empty[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's tokenizer in transformers, as the library made it."""
        return self.tokenizing.tokenizer

    @property
    def own_limit(self) -> int:
        """Tokens after which the library cuts an input of its own accord."""
        return self._empty[1]

    def gives_log_odds(self) -> bool:
        """Whether `predict` returns log-odds, which a sigmoid turns into probabilities."""
        if self.spec.task == "embedding" or self.tokenizing.num_labels > 1:
            return False
        return type(self.tokenizing.activation_fn).__name__ == "Identity"

    def token_ids(self, inputs: Inputs) -> list[list[int]]:
        """Each input's token ids, recorded where the library passes them to its model."""
        model, recorded = self.tokenizing, {}
        original = model.preprocess

        def watched(batch: Sequence[Any], *args: Any, **options: Any) -> Any:
            features = original(batch, *args, **options)
            for content, ids, mask in zip(
                batch, features["input_ids"], features["attention_mask"], strict=True
            ):
                recorded[content] = ids[mask.bool()].tolist()
            return features

        def stop(*_: Any) -> None:
            raise _TokenizedError

        rows: list[list[int]] = [[] for _ in inputs]
        model.preprocess = watched
        hook = model.register_forward_pre_hook(stop)
        try:
            for group in self.groups(inputs):
                for start in range(0, len(group), CHUNK):
                    indices = group[start : start + CHUNK]
                    batch: Any = [inputs[i] for i in indices]
                    try:
                        _call(model, batch)
                    except _TokenizedError:
                        for i in indices:
                            rows[i] = self._without_padding(recorded[_content(inputs[i])])
                    recorded.clear()
        except Exception as error:
            raise self._failed("cannot tokenize these inputs", error) from error
        finally:
            hook.remove()
            model.preprocess = original
        return rows

    def _without_padding(self, ids: list[int]) -> list[int]:
        """The tokens up to the one that is read: a classifier skips padding at the end."""
        if self.spec.score_rows is None:
            return ids
        padding = self.tokenizing.transformers_model.config.pad_token_id
        end = len(ids)
        while end > 1 and ids[end - 1] == padding:
            end -= 1
        return ids[:end]

    def groups(self, inputs: Inputs) -> Iterable[list[int]]:
        """Inputs with the same prompt, since a call takes one; single inputs if batches fail."""
        if self.spec.score_rows is not None and self.spec.inputs.skipped_token is None:
            # transformers refuses batches for a classifier without pad_token_id.
            return [[i] for i in range(len(inputs))]
        return group_indices(
            given.prompt if isinstance(given, Sample) else given.instruction for given in inputs
        ).values()

    def load(self, arithmetic: Arithmetic) -> Any:
        """Load the model with sentence-transformers: see `LiveReference`."""
        model = self._limited(
            self._open({"dtype": choose_dtype(self.spec, arithmetic)}, device="cpu")
        )
        model[0].model = self.adapted(model[0].model, arithmetic)
        return cast_and_move(model, self.spec, arithmetic, self.device)

    def answer(self, model: Any, inputs: Inputs, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Run one batch: see `LiveReference`."""
        results = np.asarray(_call(model, inputs), np.float32)
        if self.spec.task == "embedding":
            return results
        if results.ndim == 2:  # logits of no and yes
            return sigmoid(results[:, 1] - results[:, 0])
        return sigmoid(results) if self.origin.log_odds else results

    def declared(self) -> Settings:
        """The attributes of the opened model: see `LiveReference`."""
        model = self.tokenizing
        settings = {
            "prompts": {name: prompt or "" for name, prompt in model.prompts.items()},
            "default_prompt": model.default_prompt_name,
        }
        if self.spec.task == "reranker":
            return settings
        similarity = str(getattr(model.similarity_fn_name, "value", model.similarity_fn_name))
        return settings | {"similarity": similarity, "truncate_dim": model.truncate_dim}

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
        return model

    def _limited(self, model: Any) -> Any:
        """The model, made to cut inputs as requested."""
        if self.max_length is not None:
            model.max_seq_length = self.max_length
        return model

    def _failed(self, what: str, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {self.library} {what}: {type(error).__name__}: {error}"
        )


def _call(model: Any, inputs: Inputs) -> Any:
    """Run the library on inputs with the same prompt, as one batch."""
    options: dict[str, Any] = {"batch_size": len(inputs), "show_progress_bar": False}
    if isinstance(inputs[0], Pair):
        pairs = [_content(given) for given in inputs]
        return model.predict(pairs, prompt=inputs[0].instruction, **options)
    texts, prompt = [_content(given) for given in inputs], inputs[0].prompt
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
    """An input as the library takes it: a text, or a pair of texts."""
    return given.text if isinstance(given, Sample) else (given.query, given.document)
