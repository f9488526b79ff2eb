"""The reranker's second training stage: "yes" and "no" for the embedder's top candidates."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    normalize,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Qwen3Model

from embedport.texts.prompts import RerankerTokenizer

from .embedder import TEMPERATURE, Corpus, encode
from .model import compile_parts
from .optimizer import Optimizer
from .reranker import answers_of
from .wordnet import Synset

# Documents in a query's pool, candidates kept of it, lists per step, and documents per list.
POOL = 6000
CANDIDATES = 50
LISTS = 12
LIST = 8
LEARNING_RATE = 2e-4
# Decay of the running mean of the weights.
DECAY = 0.99
# Share of that mean in the final weights; the rest is the model before this stage.
SHARE = 0.5


@dataclass(frozen=True)
class Ranked:
    """A query with its document and the embedder's other top candidates.

    For a pair that the embedder was trained on, its ranking says nothing about new pairs, so the
    opinion alone is the target.

    Attributes:
        query: The query.
        documents: The correct document, then the others.
        opinion: Target cosines, float32 [documents]: the teacher's for definitions; the embedder's
            own for examples, because the teacher's made results on these worse.
        seen: Whether the embedder was trained on the pair.
    """

    query: str
    documents: Sequence[str]
    opinion: torch.Tensor
    seen: bool


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
        unseen: Synsets new to the embedder: words are queries for definitions.
        seen: Synsets of the embedder's training. Only those with examples are used: words are
            queries for definitions, and definitions are queries for examples.
        corpus: Token ids of all texts, and the teacher's vectors.
        seed: Seed of the pools.
    """
    generator = np.random.default_rng(seed)
    with_examples = [synset for synset in seen if synset.examples]
    pairs = [(synset.query, synset.definition) for synset in (*unseen, *with_examples)]
    words = len(pairs)
    pairs += [(synset.definition, synset.examples[0]) for synset in with_examples]
    documents = list(dict.fromkeys(document for _, document in pairs))
    index = {document: i for i, document in enumerate(documents)}
    document_vectors = torch.from_numpy(
        encode(embedder, [corpus.documents[text] for text in documents])
    )
    query_vectors = torch.from_numpy(
        encode(embedder, [corpus.queries[query] for query, _ in pairs], corpus.prompt)
    )
    teacher_documents, teacher_queries = (
        normalize(torch.from_numpy(corpus.targets[[corpus.index[text] for text in texts]]), dim=-1)
        for texts in (documents, [query for query, _ in pairs])
    )
    mined = []
    order = generator.permutation(len(pairs))
    for rows in np.array_split(order, len(order) // 256):
        pool = generator.choice(len(documents), min(POOL, len(documents)), replace=False)
        top = (query_vectors[rows] @ document_vectors[pool].T).topk(CANDIDATES).indices.numpy()
        for row, best in zip(rows, pool[top], strict=True):
            query, correct = pairs[row]
            others = [i for i in best if documents[i] not in (correct, query)]
            chosen = [index[correct], *others]
            opinion = (
                teacher_documents[chosen] @ teacher_queries[row]
                if row < words
                else document_vectors[chosen] @ query_vectors[row]
            )
            texts = [documents[i] for i in chosen]
            mined.append(Ranked(query, texts, opinion, bool(row >= len(unseen))))
    return mined


def train_answers(
    model: Qwen3Model,
    lists: Sequence[Ranked],
    tokenizer: RerankerTokenizer,
    *,
    steps: int,
    seed: int,
) -> None:
    """Run the second stage in place, then average with the model before it; prints the losses."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    compile_parts(model)
    optimizer = Optimizer(model, LEARNING_RATE, steps, "answers")
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    truth = torch.zeros(LISTS, LIST)
    truth[:, 0] = 1
    for _, batch in zip(range(steps), _batches(lists, seed), strict=False):
        pairs = [(ranked.query, ranked.documents[i]) for ranked, chosen in batch for i in chosen]
        logits = answers_of(model, pairs, tokenizer).view(LISTS, LIST)
        opinions = torch.stack([ranked.opinion[chosen] for ranked, chosen in batch])
        opinion = (opinions / TEMPERATURE).softmax(-1)
        seen = torch.tensor([[ranked.seen] for ranked, _ in batch])
        pointwise = binary_cross_entropy_with_logits(
            logits, truth, pos_weight=torch.tensor(float(LIST - 1))
        )
        goal = torch.where(seen, opinion, (truth + opinion) / 2)
        optimizer.step(cross_entropy(logits, goal), 0.2 * pointwise)
        mean.update_parameters(model)
    after = mean.module.state_dict()
    model.load_state_dict(
        {name: torch.lerp(value, after[name], SHARE) for name, value in before.items()}
    )
    model.eval()


def _batches(lists: Sequence[Ranked], seed: int) -> Iterator[list[tuple[Ranked, np.ndarray]]]:
    """Yield batches of (list, indices of some of its documents, the correct one first)."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(lists))
        for start in range(0, len(order) - LISTS, LISTS):
            batch = []
            for i in order[start : start + LISTS]:
                count = len(lists[i].documents)
                others = 1 + generator.choice(count - 1, LIST - 1, replace=False)
                batch.append((lists[i], np.concatenate([[0], others])))
            yield batch
