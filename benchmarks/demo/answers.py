"""The reranker's second stage: "yes" and "no" for what the embedder ranks high."""

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

from embedport.prompts import RerankerTokenizer

from .embedder import TEMPERATURE, Corpus, encode
from .model import compile_parts
from .optimizer import Optimizer
from .reranker import answers_of
from .wordnet import Synset

# Documents a query is asked of, those kept, lists a step and their length.
POOL = 6000
CANDIDATES = 50
LISTS = 12
LIST = 8
LEARNING_RATE = 2e-4
# Of the running mean of the weights.
DECAY = 0.99
# Of that mean in what is kept.
SHARE = 0.5


@dataclass(frozen=True)
class Ranked:
    """A query with its document and what the embedder ranked high for it beside that.

    Of a pair that the embedder was trained on, it is not known how high it would rank a new one's
    document: there the opinion alone is the goal.

    Attributes:
        query: The text that asks.
        documents: The right one, then the others.
        opinion: The cosines by which they should be ranked, float32 [documents]: the teacher's of
            definitions, the embedder's own of examples, which the teacher's made worse.
        seen: The embedder was trained on the pair.
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
        unseen: Their words ask for definitions.
        seen: Of those with examples words ask for definitions, and definitions for examples.
        corpus: Token ids of all of them, and the teacher's vectors.
        seed: Of the pools.
    """
    generator = np.random.default_rng(seed)
    shown = [each for each in seen if each.examples]
    pairs = [(each.query, each.definition) for each in (*unseen, *shown)]
    words = len(pairs)
    pairs += [(each.definition, each.examples[0]) for each in shown]
    documents = list(dict.fromkeys(document for _, document in pairs))
    numbers = {document: i for i, document in enumerate(documents)}
    found = torch.from_numpy(encode(embedder, [corpus.documents[text] for text in documents]))
    asked = torch.from_numpy(
        encode(embedder, [corpus.queries[query] for query, _ in pairs], corpus.prompt)
    )
    told, asking = (
        normalize(torch.from_numpy(corpus.targets[[corpus.index[text] for text in texts]]), dim=-1)
        for texts in (documents, [query for query, _ in pairs])
    )
    mined = []
    order = generator.permutation(len(pairs))
    for rows in np.array_split(order, len(order) // 256):
        pool = generator.choice(len(documents), min(POOL, len(documents)), replace=False)
        top = (asked[rows] @ found[pool].T).topk(CANDIDATES).indices.numpy()
        for row, best in zip(rows, pool[top], strict=True):
            query, right = pairs[row]
            others = [i for i in best if documents[i] not in (right, query)]
            chosen = [numbers[right], *others]
            opinion = told[chosen] @ asking[row] if row < words else found[chosen] @ asked[row]
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
    """The second stage, in place, and its mean with the model before it; prints the losses."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    compile_parts(model)
    optimizer = Optimizer(model, LEARNING_RATE, steps, "answers")
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    truth = torch.zeros(LISTS, LIST)
    truth[:, 0] = 1
    for _, batch in zip(range(steps), _batches(lists, seed), strict=False):
        pairs = [(each.query, each.documents[i]) for each, chosen in batch for i in chosen]
        found = answers_of(model, pairs, tokenizer).view(LISTS, LIST)
        opinions = torch.stack([each.opinion[chosen] for each, chosen in batch])
        opinion = (opinions / TEMPERATURE).softmax(-1)
        seen = torch.tensor([[each.seen] for each, _ in batch])
        pointwise = binary_cross_entropy_with_logits(
            found, truth, pos_weight=torch.tensor(float(LIST - 1))
        )
        goal = torch.where(seen, opinion, (truth + opinion) / 2)
        optimizer.step(cross_entropy(found, goal), 0.2 * pointwise)
        mean.update_parameters(model)
    after = mean.module.state_dict()
    model.load_state_dict(
        {name: torch.lerp(value, after[name], SHARE) for name, value in before.items()}
    )
    model.eval()


def _batches(lists: Sequence[Ranked], seed: int) -> Iterator[list[tuple[Ranked, np.ndarray]]]:
    """(list, numbers of some of its documents) of each batch, the right document's first."""
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
