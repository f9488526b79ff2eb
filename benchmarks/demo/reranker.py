"""The reranker's training: the embedder's own findings, judged yes or no.

It begins with the embedder's weights. For each query, the embedder ranks a pool as large as the
held-out one; the reranker learns to put the right document before what the embedder put on top.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import Qwen3Model

from embedport.prompts import RerankerTokenizer

from .embedder import Corpus, encode, rate
from .model import common_prefix, last_states
from .wordnet import Synset

POOL = 6000
CANDIDATES = 50
LIST = 8
HARD = 3
LISTS = 32
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Ranked:
    """A query, its document, and what the embedder ranked high for it beside that."""

    query: str
    document: str
    negatives: Sequence[str]


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
    queries = [query for query, _ in pairs]
    found = torch.from_numpy(encode(embedder, [corpus.documents[text] for text in documents]))
    asked = torch.from_numpy(
        encode(embedder, [corpus.queries[text] for text in queries], corpus.prompt)
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


def train_reranker(
    model: Qwen3Model,
    lists: Sequence[Ranked],
    tokenizer: RerankerTokenizer,
    *,
    steps: int,
    seed: int,
) -> Qwen3Model:
    """Train the model in place; prints the loss as it goes."""
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    began = time.perf_counter()
    shown = []
    for step, batch in zip(range(steps), _batches(lists, seed), strict=False):
        loss = _loss(model, batch, tokenizer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        shown.append(loss.item())
        if (step + 1) % 50 == 0:
            print(
                f"reranker {step + 1}/{steps}: loss {np.mean(shown[-50:]):.3f}, "
                f"{time.perf_counter() - began:.0f} s",
                flush=True,
            )
    return model.eval()


def scores(
    model: Qwen3Model,
    pairs: Sequence[tuple[str, str]],
    tokenizer: RerankerTokenizer,
) -> torch.Tensor:
    """Logit of "yes" minus logit of "no": float32 [pairs]."""
    rows = [ids.tolist() for ids in tokenizer.encode(pairs).ids]
    # All share the system prompt and the instruction, which are run once.
    shared = common_prefix(rows)
    states = last_states(model, [row[len(shared) :] for row in rows], shared)
    yes, no = (tokenizer.tokenizer.token_to_id(word) for word in ("yes", "no"))
    return states @ (model.embed_tokens.weight[yes] - model.embed_tokens.weight[no]).float()


def _batches(lists: Sequence[Ranked], seed: int) -> Iterator[list[tuple[str, list[str]]]]:
    """(query, documents), the right document first.

    Half of the others are any documents: what is far off teaches comparing, what is near teaches
    telling apart.
    """
    generator = np.random.default_rng(seed)
    documents = [each.document for each in lists]
    while True:
        order = generator.permutation(len(lists))
        for start in range(0, len(order) - LISTS, LISTS):
            batch = []
            for i in order[start : start + LISTS]:
                each = lists[i]
                near = generator.choice(len(each.negatives), HARD, replace=False)
                far = generator.choice(len(documents), LIST - 1 - HARD)
                others = [each.negatives[j] for j in near] + [documents[j] for j in far]
                batch.append((each.query, [each.document, *others]))
            yield batch


def _loss(
    model: Qwen3Model,
    batch: Sequence[tuple[str, list[str]]],
    tokenizer: RerankerTokenizer,
) -> torch.Tensor:
    """The right document before the others, and each answer by itself."""
    pairs = [(query, document) for query, documents in batch for document in documents]
    with torch.autocast("cpu", torch.bfloat16):
        found = scores(model, pairs, tokenizer).float().view(len(batch), LIST)
    right = torch.zeros(len(batch), dtype=torch.long)
    answers = torch.zeros_like(found)
    answers[:, 0] = 1
    listwise = cross_entropy(found, right)
    pointwise = binary_cross_entropy_with_logits(
        found, answers, pos_weight=torch.tensor(float(LIST - 1))
    )
    return listwise + 0.2 * pointwise
