"""The reranker's first training stage: produce the embedder's vectors of both texts of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import normalize
from transformers import Qwen3Model

from embedport.texts.prompts import EmbeddingTokenizer, RerankerTokenizer

from .embedder import PROMPT
from .half import fast_products
from .model import chunk_states, common_prefix, compile_parts, split_prefix
from .optimizer import Optimizer
from .reranker import DOCUMENT_PLACE, MARKS, QUERY_PLACE, encode_pairs, last_layer, token_of

END_OF_MESSAGE = "<|im_end|>"
MARK = 4.0
# Length of the produced vectors: different lengths would change the ranking.
LENGTH = 8.0
# Weight of the vectors at the texts' tokens, relative to those at the two places.
TOKENS_WEIGHT = 1.0
# Texts with known vectors, and pairs of them per step.
CROPS = 48_000
PAIRS = 96
LEARNING_RATE = 2e-3


def train_places(
    model: Qwen3Model,
    embedder: Qwen3Model,
    texts: tuple[Sequence[str], Sequence[str]],
    tokenizers: tuple[EmbeddingTokenizer, RerankerTokenizer],
    *,
    steps: int,
    seed: int,
    state: Path,
) -> None:
    """Run the first stage in place, on all layers but the last; prints the losses.

    Pairs are random: neither vector can be guessed from the other, and there are too many pairs to
    memorize.

    Args:
        model: From `make_reranker`.
        embedder: Gives the target vectors.
        texts: (possible queries, possible documents).
        tokenizers: The embedder's and the reranker's.
        steps: Number of steps, with `PAIRS` pairs each.
        seed: Seed of the pairs.
        state: See `Optimizer`.
    """
    embedding, pairing = tokenizers
    half = model.config.hidden_size // 2
    generator = np.random.default_rng(seed)
    queries, documents = (
        [_crop(candidates, generator) for _ in range(CROPS)] for candidates in texts
    )
    query_targets = _read(embedder, queries, PROMPT, embedding)
    document_targets = _read(embedder, documents, "", embedding)
    model.train()
    last_layer(model).requires_grad_(False)
    compile_parts(model)
    optimizer = Optimizer(model, LEARNING_RATE, steps, "places", state)
    chosen_pairs = generator.integers(CROPS, size=(steps, PAIRS, 2))
    for chosen in chosen_pairs[optimizer.done :]:
        rows, shared = encode_pairs([(queries[q], documents[d]) for q, d in chosen], pairing)
        targets = [(query_targets[q], document_targets[d]) for q, d in chosen]
        distances, hints, marks = [], [], []
        with fast_products():
            front = model(torch.tensor([shared])).last_hidden_state
            marks.append((front[..., MARKS] - torch.tensor([0.0, 0.0, 1.0])).square().mean())
            for chunk, states in chunk_states(model, rows, shared):
                share = len(chunk) / len(rows)
                goals = _goals(
                    [rows[i] for i in chunk], [targets[i] for i in chunk], pairing.tokenizer
                )
                marks.append((states[..., MARKS] - goals.marks).square().mean() * share)
                vectors = states[goals.rows, goals.columns, :half].float() / LENGTH
                errors = (vectors - goals.vectors).square().sum(-1)
                distances.append(errors[goals.at_place].mean() * share)
                hints.append(errors[~goals.at_place].mean() * share)
        optimizer.step(
            torch.stack(distances).sum(),
            TOKENS_WEIGHT * torch.stack(hints).sum(),
            torch.stack(marks).sum(),
        )
    last_layer(model).requires_grad_(True)


def _crop(texts: Sequence[str], generator: np.random.Generator) -> str:
    """A random text, or in a quarter of the cases a run of its words."""
    text = texts[int(generator.integers(len(texts)))]
    words = text.split()
    if generator.random() < 0.75:
        return text
    start, end = sorted(generator.integers(0, len(words) + 1, 2))
    return " ".join(words[start:end]) or text


@dataclass(frozen=True)
class _Text:
    """A text's tokens and vectors in the embedder.

    Attributes:
        ids: Token ids after the prompt; the last is the end-of-text token.
        vectors: Unit vectors of the tokens' states, float16 [tokens, hidden / 2]; the last is the
            text's.
    """

    ids: Sequence[int]
    vectors: torch.Tensor


def _read(
    embedder: Qwen3Model, texts: Sequence[str], prompt: str, tokenizer: EmbeddingTokenizer
) -> list[_Text]:
    rows, shared = split_prefix(tokenizer.encode(texts, prompt).ids)
    half = embedder.config.hidden_size // 2
    by_index: dict[int, _Text] = {}
    with torch.inference_mode():
        for chunk, states in chunk_states(embedder, rows, shared):
            units = normalize(states[..., :half], dim=-1).half()
            for index, vectors in zip(chunk, units, strict=True):
                by_index[index] = _Text(rows[index], vectors[: len(rows[index])].clone())
    return [by_index[index] for index in range(len(rows))]


@dataclass(frozen=True)
class _Goals:
    """Targets of the first stage for some rows.

    Attributes:
        rows, columns: Positions of the tokens with a target vector.
        vectors: The target vectors, float32 [tokens, hidden / 2].
        at_place: Whether a token is at one of the two places, bool [tokens].
        marks: Target values of the coordinates `MARKS`, float32 [rows, longest, 3].
    """

    rows: list[int]
    columns: list[int]
    vectors: torch.Tensor
    at_place: torch.Tensor
    marks: torch.Tensor


def _goals(
    rows: Sequence[list[int]], pairs: Sequence[tuple[_Text, _Text]], tokenizer: Tokenizer
) -> _Goals:
    query_place = token_of(tokenizer, QUERY_PLACE)
    document_place = token_of(tokenizer, DOCUMENT_PLACE)
    end_of_message = token_of(tokenizer, END_OF_MESSAGE)
    marks = torch.zeros(len(rows), max(map(len, rows)), len(MARKS))
    marks[..., 2] = 1
    numbers, columns, vectors, at_place = [], [], [], []
    for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        places = row.index(query_place), row.index(document_place)
        ends = places[0] - 1, row.index(end_of_message)  # a newline follows the query
        for mark, (place, end, text) in enumerate(zip(places, ends, pair, strict=True)):
            marks[number, place, mark] = MARK
            # A text's first word may be tokenized differently here, so match from the end.
            same = len(common_prefix(row[:end][::-1], text.ids[-2::-1]))
            numbers += [number] * (same + 1)
            columns += [*range(end - same, end), place]
            vectors.append(text.vectors[-1 - same :].float())
            at_place += [False] * same + [True]
    return _Goals(numbers, columns, torch.cat(vectors), torch.tensor(at_place), marks)
