"""Training of the embedder: InfoNCE and distillation at three Matryoshka widths."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, normalize
from transformers import Qwen3Model

from embedport.texts.prompts import DEFAULT_INSTRUCTION, query_prompt

from .half import fast_products
from .model import compile_parts, last_states, make_model
from .optimizer import Optimizer
from .wordnet import Synset

PROMPT = query_prompt(DEFAULT_INSTRUCTION)
TEMPERATURE = 0.05
# Weight of the distance to the teacher; its gradients are small compared with InfoNCE's.
DISTANCE_WEIGHT = 8.0
PAIRS = 384
LEARNING_RATE = 2e-3
ROWS = 4096


@dataclass(frozen=True)
class Corpus:
    """Texts with their token ids and, for training, the teacher's vectors.

    Attributes:
        prompt: Token ids at the start of every query: the prompt without its colon, which is
            tokenized together with the following word.
        queries: Text to its remaining token ids as a query.
        documents: Text to its token ids as a document.
        targets: float32 [texts, hidden], the teacher's principal components.
        index: Text to its row in `targets`.
    """

    prompt: Sequence[int]
    queries: Mapping[str, Sequence[int]]
    documents: Mapping[str, Sequence[int]]
    targets: np.ndarray
    index: Mapping[str, int]


def make_pairs(synsets: Sequence[Synset], generator: np.random.Generator) -> list[tuple[str, str]]:
    """One epoch's (query, document) pairs: words and definition, definition and example."""
    pairs = []
    for synset in synsets:
        # Half the time, use one of the words alone.
        single = len(synset.words) > 1 and generator.random() < 0.5
        words = synset.words[generator.integers(len(synset.words))] if single else synset.query
        pairs.append((words, synset.definition))
        if synset.examples:
            pairs.append(
                (synset.definition, synset.examples[generator.integers(len(synset.examples))])
            )
    return pairs


def train_embedder(
    synsets: Sequence[Synset],
    corpus: Corpus,
    table: np.ndarray,
    *,
    steps: int,
    seed: int,
    state: Path,
) -> Qwen3Model:
    """Train from the teacher's token vectors; prints the losses. `state`: see `Optimizer`."""
    model = make_model(table, seed)
    compile_parts(model)
    optimizer = Optimizer(model, LEARNING_RATE, steps, "embedder", state)
    for pairs in itertools.islice(pair_batches(synsets, seed), optimizer.done, steps):
        contrast, distance = _losses(model, pairs, corpus)
        optimizer.step(contrast, DISTANCE_WEIGHT * distance)
    return model.eval()


def pair_batches(synsets: Sequence[Synset], seed: int) -> Iterator[list[tuple[str, str]]]:
    """Yield batches of `make_pairs`, epoch after epoch."""
    generator = np.random.default_rng(seed)
    while True:
        pairs = make_pairs(synsets, generator)
        order = generator.permutation(len(pairs))
        for start in range(0, len(order) - PAIRS, PAIRS):
            yield [pairs[i] for i in order[start : start + PAIRS]]


def _losses(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], corpus: Corpus
) -> tuple[torch.Tensor, torch.Tensor]:
    with fast_products():
        queries = last_states(model, [corpus.queries[text] for text, _ in pairs], corpus.prompt)
        documents = last_states(model, [corpus.documents[text] for _, text in pairs])
    width = model.config.hidden_size
    return pair_losses((queries, documents), pairs, corpus, (width, width // 2, width // 4))


def pair_losses(
    found: tuple[torch.Tensor, torch.Tensor],
    pairs: Sequence[tuple[str, str]],
    corpus: Corpus,
    dims: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(InfoNCE, distance to the teacher), each averaged over the widths.

    Args:
        found: States of the queries and of the documents, float32 [pairs, hidden] each.
        pairs: Matching (query, document) pairs.
        corpus: The texts with the teacher's vectors.
        dims: Matryoshka widths.
    """
    queries, documents = ([pair[i] for pair in pairs] for i in (0, 1))
    targets = [
        torch.from_numpy(corpus.targets[[corpus.index[text] for text in texts]])
        for texts in (queries, documents)
    ]
    # Pairs that share a query or a document are not each other's negatives.
    same = torch.tensor([[q == p or d == e for p, d in pairs] for q, e in pairs])
    same.fill_diagonal_(False)
    contrasts, distances = [], []
    for dim in dims:
        q, d = (normalize(x[:, :dim], dim=-1) for x in found)
        scores = (q @ d.T / TEMPERATURE).masked_fill(same, -torch.inf)
        goal = torch.arange(len(pairs))
        contrasts.append((cross_entropy(scores, goal) + cross_entropy(scores.T, goal)) / 2)
        for x, target in zip((q, d), targets, strict=True):
            distances.append(1 - (x * normalize(target[:, :dim], dim=-1)).sum(-1).mean())
    return torch.stack(contrasts).mean(), torch.stack(distances).mean()


def encode(
    model: Qwen3Model, rows: Sequence[Sequence[int]], prefix: Sequence[int] = ()
) -> np.ndarray:
    """Unit vectors in fp32: float32 [rows, hidden]."""
    with torch.inference_mode():
        parts = [
            normalize(last_states(model, rows[start : start + ROWS], prefix), dim=-1)
            for start in range(0, len(rows), ROWS)
        ]
    return torch.cat(parts).numpy()
