"""The reranker's training, in two stages.

Comparing two texts is hard to discover by gradient descent from "yes" and "no" alone. So the model
begins as the embedder with one layer more. The first stage teaches it, in one text, to make the
embedder's vector of the query behind the query, and that of the document behind the document, and
to mark the two places. What the embedder has at the tokens between is learnt too: there are many of
them, and each shows which tokens belong together. Then the last layer is made to fetch both vectors
and to add their inner product to "yes". The second stage trains everything on what the embedder
itself ranks high: of texts that are new to it against the truth and the teacher's opinion, of
others against an opinion alone. What is kept is a mean of the model before and after it, which is
better than either (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).

Many steps of few pairs teach far more in an hour than few steps of many.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    normalize,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from embedport.prompts import (
    DEFAULT_INSTRUCTION,
    END_OF_TEXT,
    EmbeddingTokenizer,
    RerankerTokenizer,
    query_prompt,
)

from .embedder import TEMPERATURE, Corpus, encode, rate
from .model import (
    GEOMETRY,
    chunk_states,
    common_prefix,
    compile_parts,
    last_states,
    make_model,
    split_prefix,
)
from .wordnet import Synset

LAYERS = 4
PROMPT = query_prompt(DEFAULT_INSTRUCTION)
# Tokens behind the query and behind the document, at which their vectors are made.
QUERY_PLACE, DOCUMENT_PLACE = "<Document", "</think>"
END_OF_MESSAGE = "<|im_end|>"
WIDTH, HEAD = GEOMETRY.hidden_size, GEOMETRY.head_dim
HALF = WIDTH // 2
# The last coordinates of a state say whether its token is a query's place, a document's, or any.
MARKS = (WIDTH - 3, WIDTH - 2, WIDTH - 1)
MARK = 4.0
# Length of the vectors that are made: lengths that differ would change the ranking.
LENGTH = 8.0
# Coordinates of a head that the rotary embedding turns least.
SLOW = (HEAD // 2 - 1, HEAD - 1, HEAD // 2 - 2)
# Of the vectors at the tokens between, beside those at the two places.
TOKENS_WEIGHT = 1.0
# Gain of the queries and keys that look for the marks.
SHARP = 2.0
# How much louder what they fetch is than what was there.
LOUD = 16.0
# Of the first stage: texts whose vectors are known, and pairs of them a step.
CROPS = 48_000
PAIRS = 96
# Of the second: documents a query is asked of, those kept, lists a step and their length.
POOL = 6000
CANDIDATES = 50
LISTS = 12
LIST = 8
# Pairs from whose scores their spread is learnt.
SAMPLE = 64
# Standard deviation of the scores when the last layer is made.
SPREAD = 2.0
PLACES_RATE = 2e-3
ANSWERS_RATE = 2e-4
# Of the running mean of the weights in the second stage.
DECAY = 0.99
# Of the model after the second stage in what is kept.
SHARE = 0.7


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


def make_reranker(embedder: Qwen3Model, tokenizer: Tokenizer, seed: int) -> Qwen3Model:
    """The embedder with a last layer that does nothing yet."""
    weights = embedder.state_dict()
    model = make_model(weights["embed_tokens.weight"].numpy(), seed, num_layers=LAYERS)
    model.load_state_dict(weights, strict=False)
    last = _last_layer(model)
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
        for place in (QUERY_PLACE, DOCUMENT_PLACE):
            row = model.embed_tokens.weight[_token(tokenizer, END_OF_TEXT)]
            model.embed_tokens.weight[_token(tokenizer, place)] = row
    return model


def train_places(
    model: Qwen3Model,
    embedder: Qwen3Model,
    texts: tuple[Sequence[str], Sequence[str]],
    tokenizers: tuple[EmbeddingTokenizer, RerankerTokenizer],
    *,
    steps: int,
    seed: int,
) -> None:
    """The first stage, in place, all layers but the last; prints the losses as it goes.

    Any two texts stand in one: neither vector can be guessed from the other, and there are more
    pairs than can be learnt by heart.

    Args:
        model: Of `make_reranker`.
        embedder: Makes the vectors that are learnt.
        texts: What may be a query, and what may be a document.
        tokenizers: The embedder's and the reranker's.
        steps: Of `PAIRS` pairs.
        seed: Of the pairs.
    """
    embedding, pairing = tokenizers
    generator = np.random.default_rng(seed)
    queries, documents = ([_crop(some, generator) for _ in range(CROPS)] for some in texts)
    asking = _read(embedder, queries, PROMPT, embedding)
    answering = _read(embedder, documents, "", embedding)
    model.train()
    _last_layer(model).requires_grad_(False)
    compile_parts(model)
    optimizer = _Optimizer(model, PLACES_RATE, steps)
    for _ in range(steps):
        chosen = generator.integers(CROPS, size=(PAIRS, 2))
        rows, shared = _encode([(queries[q], documents[d]) for q, d in chosen], pairing)
        known = [(asking[q], answering[d]) for q, d in chosen]
        distances, hints, marks = [], [], []
        with torch.autocast("cpu", torch.bfloat16):
            front = model(torch.tensor([shared])).last_hidden_state
            marks.append((front[..., MARKS] - torch.tensor([0.0, 0.0, 1.0])).square().mean())
            for chunk, states in chunk_states(model, rows, shared):
                share = len(chunk) / len(rows)
                goals = _goals(
                    [rows[i] for i in chunk], [known[i] for i in chunk], pairing.tokenizer
                )
                marks.append((states[..., MARKS] - goals.marks).square().mean() * share)
                found = states[goals.rows, goals.columns, :HALF].float() / LENGTH
                errors = (found - goals.vectors).square().sum(-1)
                distances.append(errors[goals.at_place].mean() * share)
                hints.append(errors[~goals.at_place].mean() * share)
        optimizer.step(
            torch.stack(distances).sum(),
            TOKENS_WEIGHT * torch.stack(hints).sum(),
            torch.stack(marks).sum(),
        )
    _last_layer(model).requires_grad_(True)


def _crop(texts: Sequence[str], generator: np.random.Generator) -> str:
    """A text, or every fourth time some words of one that stand together."""
    text = texts[int(generator.integers(len(texts)))]
    words = text.split()
    if generator.random() < 0.75:
        return text
    start, end = sorted(generator.integers(0, len(words) + 1, 2))
    return " ".join(words[start:end]) or text


@dataclass(frozen=True)
class _Text:
    """A text as the embedder reads it.

    Attributes:
        ids: Its tokens behind the prompt, the end of the text last.
        vectors: Unit vectors of the tokens' states, float16 [tokens, HALF]; the text's own is last.
    """

    ids: Sequence[int]
    vectors: torch.Tensor


def _read(
    embedder: Qwen3Model, texts: Sequence[str], prompt: str, tokenizer: EmbeddingTokenizer
) -> list[_Text]:
    rows, shared = split_prefix(tokenizer.encode(texts, prompt).ids)
    found: dict[int, _Text] = {}
    with torch.inference_mode():
        for chunk, states in chunk_states(embedder, rows, shared):
            units = normalize(states[..., :HALF], dim=-1).half()
            for number, unit in zip(chunk, units, strict=True):
                found[number] = _Text(rows[number], unit[: len(rows[number])].clone())
    return [found[number] for number in range(len(rows))]


@dataclass(frozen=True)
class _Goals:
    """What the first stage teaches some rows.

    Attributes:
        rows, columns: Of the tokens at which vectors are learnt.
        vectors: Those, float32 [tokens, HALF].
        at_place: Which of them are at the two places, bool [tokens].
        marks: What `MARKS` should hold, float32 [rows, longest, 3].
    """

    rows: list[int]
    columns: list[int]
    vectors: torch.Tensor
    at_place: torch.Tensor
    marks: torch.Tensor


def _goals(
    rows: Sequence[list[int]], pairs: Sequence[tuple[_Text, _Text]], tokenizer: Tokenizer
) -> _Goals:
    query_place, document_place = _token(tokenizer, QUERY_PLACE), _token(tokenizer, DOCUMENT_PLACE)
    end_of_message = _token(tokenizer, END_OF_MESSAGE)
    marks = torch.zeros(len(rows), max(map(len, rows)), len(MARKS))
    marks[..., 2] = 1
    numbers, columns, vectors, at_place = [], [], [], []
    for number, (row, pair) in enumerate(zip(rows, pairs, strict=True)):
        places = row.index(query_place), row.index(document_place)
        ends = places[0] - 1, row.index(end_of_message)  # a line ends behind the query
        for mark, (place, end, text) in enumerate(zip(places, ends, pair, strict=True)):
            marks[number, place, mark] = MARK
            # A text's first word may be other tokens here.
            same = len(common_prefix(row[:end][::-1], text.ids[-2::-1]))
            numbers += [number] * (same + 1)
            columns += [*range(end - same, end), place]
            vectors.append(text.vectors[-1 - same :].float())
            at_place += [False] * same + [True]
    return _Goals(numbers, columns, torch.cat(vectors), torch.tensor(at_place), marks)


def join_places(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> None:
    """Make the last layer fetch both vectors and add their inner product to "yes".

    Its heads look for the marks. Its SwiGLU multiplies: silu(q) d - silu(-q) d = q d, for each
    coordinate of the vectors' first halves.

    Args:
        model: With its first stage behind it.
        pairs: Some pairs, from whose scores their spread is learnt.
        tokenizer: Of the pairs.
    """
    last, gains = _last_layer(model), model.norm.weight.detach()
    attention, mlp = last.self_attn, last.mlp
    model.eval()
    size = _size_of_states(model, pairs, tokenizer)
    difference = gains * _answer(model, tokenizer.tokenizer).detach()
    part = torch.eye(WIDTH)
    with torch.no_grad():
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(SHARP)
        at_query, at_document, anywhere = part[list(MARKS)] * gains
        keys = torch.zeros(HEAD, WIDTH)
        keys[list(SLOW)] = torch.stack([at_query, at_document, anywhere])
        attention.k_proj.weight.copy_(keys.repeat(GEOMETRY.num_kv_heads, 1))
        attention.v_proj.weight.copy_(part[:HALF] * gains)
        out = torch.zeros(WIDTH, GEOMETRY.num_heads * HEAD)
        for head in range(GEOMETRY.num_heads):
            group, place = divmod(head, 2)
            queries = torch.zeros(HEAD, WIDTH)
            queries[SLOW[place]], queries[SLOW[2]] = anywhere, -0.5 * anywhere
            rows = slice(head * HEAD, (head + 1) * HEAD)
            attention.q_proj.weight[rows] = queries
            start = place * HALF + group * HEAD
            out[:, rows] = part[:, start : start + HEAD]
        # What is fetched drowns what was there, and says nothing about "yes" by itself.
        out -= torch.outer(difference, difference @ out) / (difference @ difference)
        attention.o_proj.weight.copy_(LOUD * size * out)
        mlp.gate_proj.weight[: 2 * HALF] = torch.cat([part[:HALF], -part[:HALF]])
        mlp.up_proj.weight[: 2 * HALF] = torch.cat([part[HALF:], part[HALF:]])
        answer = difference / (difference @ difference) * size / HALF
        mlp.down_proj.weight[:, :HALF] = answer[:, None]
        mlp.down_proj.weight[:, HALF : 2 * HALF] = -answer[:, None]
        mlp.down_proj.weight.mul_(SPREAD / _answers(model, pairs, tokenizer).std())


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
    optimizer = _Optimizer(model, ANSWERS_RATE, steps)
    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    truth = torch.zeros(LISTS, LIST)
    truth[:, 0] = 1
    for _, batch in zip(range(steps), _batches(lists, seed), strict=False):
        pairs = [(each.query, each.documents[i]) for each, chosen in batch for i in chosen]
        found = _answers(model, pairs, tokenizer).view(LISTS, LIST)
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


class _Optimizer:
    """AdamW with its schedule; prints the mean losses now and then."""

    def __init__(self, model: Qwen3Model, learning_rate: float, steps: int) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._adam = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._adam, lambda step: rate(step, steps, warm_up=steps // 10)
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


def _last_layer(model: Qwen3Model) -> Qwen3DecoderLayer:
    return cast(Qwen3DecoderLayer, model.layers[-1])


def _token(tokenizer: Tokenizer, word: str) -> int:
    (found,) = tokenizer.encode(word, add_special_tokens=False).ids
    return found


def _answer(model: Qwen3Model, tokenizer: Tokenizer) -> torch.Tensor:
    """The head's row of "yes" less its row of "no": float32 [hidden]."""
    weight = model.embed_tokens.weight
    return weight[_token(tokenizer, "yes")] - weight[_token(tokenizer, "no")]


def _encode(
    pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> tuple[list[list[int]], list[int]]:
    """Token ids behind the system prompt and the instruction, which all share; and those."""
    return split_prefix(tokenizer.encode(pairs).ids)


def _answers(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> torch.Tensor:
    """Logit of "yes" minus logit of "no": float32 [pairs]."""
    rows, shared = _encode(pairs, tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        states = last_states(model, rows, shared)
    return states @ _answer(model, tokenizer.tokenizer)


def _size_of_states(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> float:
    """Root mean square of the last tokens' states before the last layer, pairs' mean."""
    sizes = []
    with torch.inference_mode():
        for ids in tokenizer.encode(pairs).ids:
            found = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
            sizes.append(found[LAYERS - 1][0, -1].square().mean().sqrt().item())
    return float(np.mean(sizes))


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
