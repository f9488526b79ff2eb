"""The embedder: texts in, vectors out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from ..artifact.folder import record_ranges
from ..checkpoint.pipeline import Outputs
from ..checks import check_integer
from ..errors import InputError
from ..texts.prompts import EmbeddingTokenizer, Encoded, check_list, resolve_prompt
from .batching import choose_batch_tokens, run_batches
from .info import Model, ModelInfo
from .reopening import reopen, reopening
from .vectors import (
    VECTOR_PRECISIONS,
    check_ranges,
    measure_ranges,
    mrl_dims,
    quantize_vectors,
    shorten,
)

logger = logging.getLogger(__name__)


class Embedder:
    """A loaded embedding model.

    Attributes:
        info: The model's description.
        artifact: The artifact it was loaded from; None for a checkpoint without a manifest.
        model: Maps (input_ids, attention_mask), int64 [batch, sequence], to float32 [batch, dim].
        tokenizer: Maps texts to token ids.
        device: The device it runs on.
        precision: The storage format and the arithmetic, in words.
        dim: Width of its vectors.
        prompts: Prompt name to the text put before an input.
        ranges: Each value's range by width, for 8-bit vectors; None before `calibrate`.
    """

    def __init__(self, info: ModelInfo, model: Model, tokenizer: EmbeddingTokenizer) -> None:
        self.info = info
        self.artifact = info.artifact
        self.model: Callable[..., np.ndarray] = model
        self.tokenizer = tokenizer
        self.device = model.device
        self.precision = model.precision
        self.dim = info.dim
        self.prompts = dict(info.prompts)
        self.ranges = info.ranges

    def __repr__(self) -> str:
        return (
            f"Embedder({self.info.name!r}, dim={self.dim}, device={self.device!r}, "
            f"precision={self.precision!r})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the recipe that opens the model again from its folder."""
        recipe = reopening(self.info, self.device, self.tokenizer.max_length)
        return reopen, (recipe, self.ranges)

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
            texts: The texts. An empty list is allowed; so is an empty text if the tokenizer adds a
                token to it.
            prompt: A name ("query", "document", or another of `prompts`), or the literal text to
                put before each input, such as `embedport.query_prompt("Find the law that
                applies")`; by default the model's default prompt, if it has one.
            dim: Number of leading values to keep (MRL); unit vectors are normalized again.
            precision: The vectors' format: "float32"; "int8" or "uint8", after `calibrate`;
                "binary" or "ubinary", one bit per value, eight values to a byte.
            batch_tokens: Maximum tokens in a batch, including padding; by default enough to keep
                the device busy.
            progress: Whether to show a progress bar on a terminal, or a function to call with the
                number of texts just done.
            first: The first text's number in messages, if `texts` is part of a larger list.

        Returns:
            float32 [len(texts), dim] in the order of `texts`, of unit length unless the model's
            files have no Normalize module; or integers, see `quantize_vectors`.

        Raises:
            InputError: A text is not valid Unicode; the model does not have this `prompt` or `dim`;
                the precision needs ranges that were not measured; or a text gives NaN or infinity,
                which would stay in an index for ever (`embed_texts` returns them).

        >>> model = embedport.load_embedder(embedder, device="cpu")
        >>> queries = model.encode(["What do people drink in China?"], prompt="query")
        >>> documents = model.encode(["tea: a hot drink", "car: a motor vehicle"], dim=256)
        >>> documents.dtype, bool(queries[0] @ documents[0] > queries[0] @ documents[1])
        (dtype('float32'), True)
        """
        check_options(self.dim, dim, precision)
        check_ranges(precision, dim or self.dim, self.ranges)
        vectors = self.embed_texts(
            texts, prompt=prompt, batch_tokens=batch_tokens, progress=progress, first=first
        )
        if problem := describe_nonfinite(vectors, self.precision, "text", first):
            raise InputError(problem)
        if dim is not None:
            vectors = shorten(vectors, dim, unit_length=self.info.outputs.unit_length)
        return quantize_vectors(vectors, precision, self.ranges)

    def embed_texts(
        self,
        texts: Sequence[str],
        *,
        prompt: str | None = None,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], None] = False,
        first: int = 0,
    ) -> np.ndarray:
        """Embed texts as `encode` does, but return NaN and infinity where the model gives them.

        Args:
            texts: As for `encode`.
            prompt: As for `encode`.
            batch_tokens: As for `encode`.
            progress: As for `encode`.
            first: As for `encode`.

        Returns:
            float32 [len(texts), dim].

        Raises:
            InputError: A text is not valid Unicode, or the model does not have this `prompt`.
        """
        text = self.prompt_text(prompt)
        encoded = self.tokenizer.encode(texts, text)
        check_encoded(encoded, self.info.vocab_size, self.tokenizer.max_length, "text", first)
        prompt_length = self.prompt_length(text)
        check_pooled(encoded.ids, self.info.outputs, prompt_length, first)
        return self.embed_rows(
            encoded.ids,
            prompt_length=prompt_length,
            batch_tokens=batch_tokens,
            progress=progress,
        )

    def embed_rows(
        self,
        rows: Sequence[np.ndarray],
        *,
        prompt_length: int = 0,
        batch_tokens: int | None = None,
        progress: bool | Callable[[int], None] = False,
    ) -> np.ndarray:
        """Embed texts that are already tokenized, prompts and end tokens included.

        Args:
            rows: Token ids, int64 [tokens] each.
            prompt_length: From `self.prompt_length`, for the prompt that all rows begin with.
            batch_tokens: As for `encode`.
            progress: As for `encode`.

        Returns:
            float32 [rows, dim], in the order of `rows`; NaN and infinity are not looked for.
        """
        model = self.model
        if not self.info.outputs.include_prompt:
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
        self, texts: Iterable[str], *, prompt: str | None = None, batch_tokens: int | None = None
    ) -> None:
        """Measure the ranges that 8-bit vectors need, and store them in the manifest.

        For a checkpoint without a manifest, and for a model in the hub's cache (which is never
        written to), the ranges stay in memory only, in `ranges`.

        Args:
            texts: Texts like those to be embedded, a few hundred or more.
            prompt: As for `encode`.
            batch_tokens: As for `encode`.

        Raises:
            InputError: There are fewer than two texts, or a text is not valid Unicode or gives NaN.
            ArtifactError: The manifest cannot be written.
        """
        check_list(texts, "texts should be a list of strings")
        texts = list(texts)  # a generator has no length
        if len(texts) < 2:
            raise InputError(f"calibration needs at least two texts, found {len(texts)}")
        vectors = self.encode(texts, prompt=prompt, batch_tokens=batch_tokens)
        ranges = measure_ranges(vectors, unit_length=self.info.outputs.unit_length)
        if self.ranges not in (None, ranges):
            logger.warning(
                "%s had other ranges: its 8-bit vectors from before do not compare with new ones; "
                "make them again",
                self.info.name,
            )
        self.ranges = ranges
        if self.artifact is not None and self.keeps_ranges:
            record_ranges(self.artifact, ranges)

    def check_measured(self, dim: int | None, precision: str) -> None:
        """Check that `calibrate` will measure what `encode` needs, before the work.

        Args:
            dim: As for `encode`.
            precision: As for `encode`.

        Raises:
            InputError: The model does not have this `dim`, or ranges are not measured at it.
        """
        check_options(self.dim, dim, precision)
        measured = {str(each): () for each in mrl_dims(self.dim)}
        check_ranges(precision, dim or self.dim, measured)

    @property
    def keeps_ranges(self) -> bool:
        """Whether `calibrate` has a manifest to store ranges in."""
        return self.artifact is not None and not self.info.is_cached

    def prompt_text(self, prompt: str | None) -> str:
        """Resolve a prompt's name, or a literal prompt, to its text: see `resolve_prompt`."""
        return resolve_prompt(self.info.inputs, prompt)

    def prompt_length(self, text: str) -> int:
        """Number of a prompt's tokens to leave out of pooling; 0 if the model pools prompts."""
        return 0 if self.info.outputs.include_prompt else self.tokenizer.prompt_length(text)


def check_options(width: int, dim: int | None, precision: str) -> None:
    """Check the requested width and format of vectors.

    Args:
        width: Width of the model's vectors.
        dim: Number of leading values to keep; None keeps all.
        precision: The vectors' format.

    Raises:
        InputError: `dim` or `precision` is not supported.
    """
    if precision not in VECTOR_PRECISIONS:
        raise InputError(
            f"precision should be one of {', '.join(VECTOR_PRECISIONS)}, found {precision!r}"
        )
    if dim is None:
        return
    check_integer("dim", dim)
    if not 1 <= dim <= width:
        raise InputError(f"dim should be from 1 to {width}, found {dim}")


def check_pooled(
    rows: Sequence[np.ndarray], outputs: Outputs, prompt_length: int, first: int = 0
) -> None:
    """Refuse a text without a last token to pool: sentence-transformers makes its state zero.

    Args:
        rows: Token ids of each text behind its prompt, int64 [tokens].
        outputs: The model's outputs, with the pooling modes.
        prompt_length: Tokens of the prompt that are left out of pooling.
        first: The first text's number in messages.

    Raises:
        InputError: A text has no token behind the prompt's.
    """
    if "lasttoken" not in outputs.pooling:
        return
    for i, ids in enumerate(rows, first):
        if len(ids) <= prompt_length:
            raise InputError(
                f"text {i} has no token behind the prompt's {prompt_length}, which the model "
                "leaves out of its pooling: it is empty, or `max_length` is too small"
            )


def check_encoded(
    encoded: Encoded, vocab_size: int, max_length: int, noun: str, first: int = 0
) -> None:
    """Check that all token ids are in the embedding table, and log which inputs were cut.

    Args:
        encoded: The inputs' token ids.
        vocab_size: Rows of the model's embedding table.
        max_length: Maximum tokens of an input.
        noun: "text" or "pair", for messages.
        first: The first input's number in messages.

    Raises:
        InputError: A token id is outside the embedding table: some checkpoints' tokenizers have a
            few more special tokens than the table has rows.
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
    """Say which inputs gave NaN or infinity; an empty string if none did.

    Args:
        values: float32 [n] or [n, dim].
        precision: The model's precision, in words.
        noun: "text" or "pair", for messages.
        first: The first input's number in messages.
    """
    bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if not len(bad):
        return ""
    return (
        f"{len(bad)} of {len(values)} {noun}s gave NaN or infinity in {precision}, the first is "
        f"{noun} {first + bad[0]}; take another precision, or calibrate with texts like it"
    )
