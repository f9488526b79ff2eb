"""The reranker's training, in two stages.

Comparing two texts is hard to discover by gradient descent from "yes" and "no" alone. So the first
stage teaches the last token what each of them says: the first half of its state is trained to be
the query's vector and the second half the document's, as the embedder was, on pairs that do not
belong together, so that neither half can be guessed from the other. The last layer begins as their
inner product, and the second stage trains everything on the embedder's own findings.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from embedport.prompts import RerankerTokenizer

from .embedder import Corpus, encode, pair_batches, pair_losses, rate
from .model import GEOMETRY, common_prefix, last_states, make_model
from .wordnet import Synset

LAYERS = 4
HALF = GEOMETRY.hidden_size // 2
POOL = 6000
CANDIDATES = 50
LIST = 8
LISTS = 48
# A logit's gain for a gain of 1 in cosine, when the last layer is made.
SHARPNESS = 20.0
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Ranked:
    """A query, its document, and what the embedder ranked high for it beside that."""

    query: str
    document: str
    negatives: Sequence[str]


def make_reranker(embedder: Qwen3Model, seed: int) -> Qwen3Model:
    """The model before training: the embedder's tokens, in both halves of the state."""
    table = embedder.embed_tokens.weight.detach()[:, :HALF]
    model = make_model(torch.cat([table, table], dim=1).numpy(), seed, num_layers=LAYERS)
    last = _last_layer(model)
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
    return model


def _last_layer(model: Qwen3Model) -> Qwen3DecoderLayer:
    return cast(Qwen3DecoderLayer, model.layers[-1])


def compare_halves(model: Qwen3Model, yes: int, no: int) -> None:
    """Make the last layer add the halves' inner product to "yes" and take it from "no".

    silu(q) d - silu(-q) d = q d, for each coordinate q of one half and d of the other.
    """
    mlp = _last_layer(model).mlp
    with torch.no_grad():
        weight = model.embed_tokens.weight
        difference = weight[yes] - weight[no]
        part = torch.eye(GEOMETRY.hidden_size)
        mlp.gate_proj.weight[: 2 * HALF] = torch.cat([part[:HALF], -part[:HALF]])
        mlp.up_proj.weight[: 2 * HALF] = torch.cat([part[HALF:], part[HALF:]])
        # Behind the norm, each half is about sqrt(HALF) long.
        answer = SHARPNESS / HALF * difference / (difference @ difference)
        mlp.down_proj.weight[:, :HALF] = answer[:, None]
        mlp.down_proj.weight[:, HALF : 2 * HALF] = -answer[:, None]


def train_halves(
    model: Qwen3Model,
    synsets: Sequence[Synset],
    corpus: Corpus,
    tokenizer: RerankerTokenizer,
    *,
    steps: int,
    seed: int,
) -> None:
    """The first stage, in place, all layers but the last; prints the losses as it goes."""
    model.train()
    _last_layer(model).requires_grad_(False)
    optimizer = _Optimizer(model, steps)
    for _, pairs in zip(range(steps), pair_batches(synsets, seed), strict=False):
        # The next pair's document stands beside a query.
        rows = [(query, pairs[i - 1][1]) for i, (query, _) in enumerate(pairs)]
        states = _states(model, rows, tokenizer)
        found = (states[:, :HALF], states[:, HALF:].roll(-1, dims=0))
        optimizer.step(*pair_losses(found, pairs, corpus, (HALF,)))
    _last_layer(model).requires_grad_(True)


def train_answers(
    model: Qwen3Model,
    lists: Sequence[Ranked],
    tokenizer: RerankerTokenizer,
    *,
    steps: int,
    seed: int,
) -> None:
    """The second stage, in place; prints the losses as it goes."""
    model.train()
    optimizer = _Optimizer(model, steps)
    right = torch.zeros(LISTS, dtype=torch.long)
    for _, batch in zip(range(steps), _batches(lists, seed), strict=False):
        pairs = [(query, document) for query, documents in batch for document in documents]
        found = _answers(model, pairs, tokenizer).view(LISTS, LIST)
        answers = torch.zeros_like(found)
        answers[:, 0] = 1
        pointwise = binary_cross_entropy_with_logits(
            found, answers, pos_weight=torch.tensor(float(LIST - 1))
        )
        optimizer.step(cross_entropy(found, right), 0.2 * pointwise)


class _Optimizer:
    """AdamW with its schedule; prints the mean losses now and then."""

    def __init__(self, model: Qwen3Model, steps: int) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._adam = torch.optim.AdamW(
            self._parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: rate(step, steps)
        )
        self._steps = steps
        self._shown: list[list[float]] = []
        self._began = time.perf_counter()

    def step(self, *losses: torch.Tensor) -> None:
        """One step down the sum of the losses."""
        self._adam.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adam.step()
        self._schedule.step()
        self._shown.append([loss.item() for loss in losses])
        done = len(self._shown)
        if done % 25 == 0:
            means = ", ".join(f"{mean:.3f}" for mean in np.mean(self._shown[-25:], axis=0))
            spent = time.perf_counter() - self._began
            print(f"reranker {done}/{self._steps}: losses {means}, {spent:.0f} s", flush=True)


def mine(
    embedder: Qwen3Model,
    unseen: Sequence[Synset],
    seen: Sequence[Synset],
    corpus: Corpus,
    seed: int,
) -> list[Ranked]:
    """The embedder's top candidates for each query in a random pool of definitions and examples.

    Args:
        embedder: The trained embedder.
        unseen: Their words ask for definitions.
        seen: Their definitions ask for examples.
        corpus: Token ids of all of them.
        seed: Of the pools.
    """
    generator = np.random.default_rng(seed)
    pairs = [(each.query, each.definition) for each in unseen]
    pairs += [(each.definition, each.examples[0]) for each in seen if each.examples]
    documents = list(dict.fromkeys(document for _, document in pairs))
    found = torch.from_numpy(encode(embedder, [corpus.documents[text] for text in documents]))
    asked = torch.from_numpy(
        encode(embedder, [corpus.queries[query] for query, _ in pairs], corpus.prompt)
    )
    mined = []
    order = generator.permutation(len(pairs))
    for rows in np.array_split(order, len(order) // 256):
        pool = generator.choice(len(documents), min(POOL, len(documents)), replace=False)
        top = (asked[rows] @ found[pool].T).topk(CANDIDATES).indices.numpy()
        for row, best in zip(rows, pool[top], strict=True):
            query, right = pairs[row]
            negatives = [documents[i] for i in best if documents[i] not in (right, query)]
            mined.append(Ranked(query, right, negatives))
    return mined


def _states(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> torch.Tensor:
    rows = [ids.tolist() for ids in tokenizer.encode(pairs).ids]
    # All share the system prompt and the instruction, which are run once.
    shared = common_prefix(rows)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        return last_states(model, [row[len(shared) :] for row in rows], shared)


def _answers(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> torch.Tensor:
    """Logit of "yes" minus logit of "no": float32 [pairs]."""
    yes, no = (tokenizer.tokenizer.token_to_id(word) for word in ("yes", "no"))
    weight = model.embed_tokens.weight
    return _states(model, pairs, tokenizer) @ (weight[yes] - weight[no])


def _batches(lists: Sequence[Ranked], seed: int) -> Iterator[list[tuple[str, list[str]]]]:
    """(query, documents) of each batch, the right document first."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(lists))
        for start in range(0, len(order) - LISTS, LISTS):
            batch = []
            for i in order[start : start + LISTS]:
                each = lists[i]
                chosen = generator.choice(len(each.negatives), LIST - 1, replace=False)
                others = [each.negatives[j] for j in chosen]
                batch.append((each.query, [each.document, *others]))
            yield batch
