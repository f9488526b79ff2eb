"""Text in, vectors out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from ..artifact import record_ranges
from ..errors import InputError
from ..prompts import EmbeddingTokenizer, Encoded, resolve_prompt
from .batching import choose_batch_tokens, run_batches
from .facts import Model, ModelFacts
from .torch import TorchModel
from .vectors import VECTOR_PRECISIONS, check_ranges, measure_ranges, quantize_vectors, shorten

logger = logging.getLogger(__name__)


class Embedder:
    """An embedding model, loaded.

    Attributes:
        facts: What it is.
        artifact: Where it came from; None for a checkpoint without a manifest.
        model: (input_ids, attention_mask), int64 [batch, sequence], to float32 [batch, dim].
        tokenizer: Texts to ids.
        device: What it runs on.
        precision: What is stored and what is computed in, in words.
        dim: Width of its vectors.
        prompts: Prompt name to the text put before an input.
        ranges: Each value's range by width, for vectors in 8 bits; None before `calibrate`.
    """

    def __init__(self, facts: ModelFacts, model: Model, tokenizer: EmbeddingTokenizer) -> None:
        self.facts = facts
        self.artifact = facts.artifact
        self.model: Callable[..., np.ndarray] = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.precision = model.precision
        self.dim = facts.dim
        self.prompts = dict(facts.prompts)
        self.ranges = facts.ranges

    def __repr__(self) -> str:
        return (
            f"Embedder({self.facts.name!r}, dim={self.dim}, device={self.device!r}, "
            f"precision={self.precision!r})"
        )

    def encode(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        dim: int | None = None,
        precision: str = "float32",
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], None] = False,
        first: int = 0,
    ) -> np.ndarray:
        """Embed texts.

        Args:
            texts: The texts; an empty one is defined where the tokenizer adds a token, and so is an
                empty list.
            prompt: A name ("query", "document", or another of `prompts`), or the literal text to
                put before each input, such as `embedport.query_prompt("Find the law that
                applies")`; by default the model's default prompt, if it has one.
            dim: Leading values to keep (MRL); vectors of unit length are normalized again.
            precision: Of the vectors: "float32"; "int8" or "uint8", after `calibrate`; "binary" or
                "ubinary", a bit a value in bytes of eight.
            batch_tokens: Tokens of a batch at most, padding counted; by default what keeps the
                device busy.
            progress: Whether to show a progress bar on a terminal, or what to call with the number
                of texts just done.
            first: What messages call the first text: its number among more texts than these.

        Returns:
            float32 [len(texts), dim], of unit length unless the model's files have no Normalize, in
            the order of `texts`; or integers, see `quantize_vectors`.

        Raises:
            InputError: A text is not valid Unicode, or `prompt` or `dim` is not one of the model's,
                or the precision needs ranges that were not measured, or a text gives NaN, which
                only "float32" can say.
        """
        if isinstance(self.model, TorchModel):  # before the tokenizer, whose threads are gone too
            self.model.check_process()
        check_options(self.dim, dim, precision)
        check_ranges(precision, dim or self.dim, self.ranges)
        text = self.prompt_text(prompt)
        encoded = self.tokenizer.encode(texts, text)
        check_encoded(encoded, self.facts.vocab_size, self.tokenizer.max_length, "text", first)
        vectors = self.embed_rows(
            encoded.ids,
            prompt_length=self.prompt_length(text),
            batch_tokens=batch_tokens,
            progress=progress,
        )
        wrong = describe_nonfinite(vectors, self.precision, "text", first)
        if wrong and precision != "float32":
            raise InputError(f"{wrong}; {precision} has no way to say so")
        if wrong:
            logger.error(wrong)
        if dim is not None:
            vectors = shorten(vectors, dim, unit_length=self.facts.outputs.unit_length)
        return quantize_vectors(vectors, precision, self.ranges)

    def embed_rows(
        self,
        rows: Sequence[np.ndarray],
        *,
        prompt_length: int = 0,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> np.ndarray:
        """Embed texts that are tokenized already, prompts and end tokens included.

        Args:
            rows: Token ids, int64 [tokens] each.
            prompt_length: Of `self.prompt_length`, for the prompt that all rows begin with.
            batch_tokens: As for `encode`, like `progress`.
            progress: Whether to show it.

        Returns:
            float32 [rows, dim], in the order of `rows`.
        """
        model = self.model
        if not self.facts.outputs.include_prompt:
            model = partial(self.model, prompt_length=prompt_length)
        return run_batches(
            model,
            rows,
            (self.dim,),
            batch_tokens=choose_batch_tokens(batch_tokens, self.device),
            description="Encoding",
            progress=progress,
        )

    def calibrate(
        self, texts: Sequence[str], *, prompt: str | None = None, batch_tokens: int | None = None
    ) -> None:
        """Measure the ranges that vectors in 8 bits need, and put them into the manifest.

        A checkpoint without a manifest keeps them in memory only, in `ranges`, and so does a model
        in the hub's cache, which is not written to.

        Args:
            texts: Texts like those to be embedded, a few hundred or more.
            prompt: As for `encode`, like `batch_tokens`.
            batch_tokens: Tokens of a batch at most.

        Raises:
            InputError: There are fewer than two texts, or one is not valid Unicode or gives NaN.
            ArtifactError: The manifest cannot be written.
        """
        if len(texts) < 2:
            raise InputError(f"calibration needs at least two texts, found {len(texts)}")
        vectors = self.encode(texts, prompt=prompt, batch_tokens=batch_tokens)
        if wrong := describe_nonfinite(vectors, self.precision, "text"):
            raise InputError(f"{wrong}; no ranges were kept")
        self.ranges = measure_ranges(vectors, unit_length=self.facts.outputs.unit_length)
        if self.keeps_ranges:
            record_ranges(self.facts.folder, self.ranges)

    @property
    def keeps_ranges(self) -> bool:
        """Whether `calibrate` finds a manifest that it may write to."""
        return self.artifact is not None and not self.facts.is_cached

    def prompt_text(self, prompt: str | None) -> str:
        """The text that a prompt's name stands for, or a literal prompt: `resolve_prompt`."""
        return resolve_prompt(self.facts.inputs, prompt)

    def prompt_length(self, text: str) -> int:
        """Tokens of a prompt's text that are not pooled: none, unless the model leaves them out."""
        return 0 if self.facts.outputs.include_prompt else self.tokenizer.prompt_length(text)


def check_options(width: int, dim: int | None, precision: str) -> None:
    """Check what vectors are asked for.

    Args:
        width: Values of the model's vectors.
        dim: Values to keep.
        precision: Of the vectors.

    Raises:
        InputError: The model does not have them.
    """
    if precision not in VECTOR_PRECISIONS:
        raise InputError(
            f"precision should be one of {', '.join(VECTOR_PRECISIONS)}, found {precision!r}"
        )
    if dim is not None and not 1 <= dim <= width:
        raise InputError(f"dim should be from 1 to {width}, found {dim}")


def check_encoded(
    encoded: Encoded, vocab_size: int, max_length: int, noun: str, first: int = 0
) -> None:
    """Log which inputs were cut.

    Args:
        encoded: The inputs' token ids.
        vocab_size: Rows of the model's embedding table.
        max_length: Tokens of an input at most.
        noun: What an input is called.
        first: The first one's number.

    Raises:
        InputError: A token is beyond the model's embedding table: some checkpoints' tokenizers
            know a few special tokens more than their table has rows.
    """
    for i, ids in enumerate(encoded.ids):
        if ids.max() >= vocab_size:
            raise InputError(
                f"{noun} {first + i} holds token {ids.max()}, and the model's table has only "
                f"{vocab_size} rows; take that special token out of the text"
            )
    if encoded.truncated:
        logger.warning(
            "%d of %d %ss cut to %d tokens, the first is %s %d",
            len(encoded.truncated),
            len(encoded.ids),
            noun,
            max_length,
            noun,
            first + encoded.truncated[0],
        )


def describe_nonfinite(values: np.ndarray, precision: str, noun: str, first: int = 0) -> str:
    """Which inputs gave NaN or infinity; nothing where none did.

    Args:
        values: float32 [n] or [n, dim].
        precision: The model's, in words.
        noun: What an input is called.
        first: The first one's number.
    """
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if not len(bad):
        return ""
    return (
        f"{len(bad)} of {len(values)} {noun}s gave NaN or infinity in {precision}, the first is "
        f"{noun} {first + bad[0]}; take another precision, or calibrate with texts like it"
    )
