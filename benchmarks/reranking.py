"""Reranking at the 0.6B geometry: what a query's rows share runs once, against each row whole."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import Worker, ours, run

QUERIES, PASSAGES = 8, 50
PASSAGE_TOKENS = (20, 700)
WAYS = ("shared", "plain")
# Below this, both give the same scores.
MOST_APART = 1e-4


def shared_against_plain(
    rounds: int, source: Path | None = None, results: Path = RESULTS, precision: str = "int8"
) -> None:
    """8 queries with 50 passages each, query by query, the two ways in turn.

    Raises:
        RuntimeError: The scores differ.
    """
    source = source or checkpoint("0.6b", "reranker")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary) / precision
        run(ours("export", "onnx", str(source), "-o", str(folder), "--precision", precision))
        command = [sys.executable, "-m", "benchmarks.reranking", str(folder)]
        workers = {way: Worker([*command, way]) for way in WAYS}
        answers: dict[str, list[list[dict[str, Any]]]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):
            for each in answers.values():
                each.append([])
            # The first round warms up, with one query.
            for query in range(QUERIES if number else 1):
                for way in sorted(WAYS, reverse=(query + number) % 2 == 1):
                    answers[way][-1].append(workers[way].ask({"query": query}))
        for worker in workers.values():
            worker.close()
    last = {way: [each["scores"] for each in answers[way][-1]] for way in WAYS}
    apart = max(
        abs(a - b)
        for shared, plain in zip(last["shared"], last["plain"], strict=True)
        for a, b in zip(shared, plain, strict=True)
    )
    if apart > MOST_APART:
        raise RuntimeError(f"the scores differ by {apart}")
    seconds = {
        way: [sum(each["seconds"] for each in one) for one in answers[way][1:]] for way in WAYS
    }
    ratios = [p / s for p, s in zip(seconds["plain"], seconds["shared"], strict=True)]
    figures = {
        "rounds": rounds,
        "precision": precision,
        "queries": QUERIES,
        "passages": PASSAGES,
        "tokens": workers["plain"].ready["tokens"],
        "seconds": {way: round(median(each), 2) for way, each in seconds.items()},
        "ratio": round(median(ratios), 3),
        "ratio_from_to": [round(min(ratios), 3), round(max(ratios), 3)],
        "peak_bytes": {way: answers[way][-1][-1]["peak_bytes"] for way in WAYS},
        "largest_difference": apart,
    }
    print_table(
        ["", "seconds", "peak GB"],
        [
            [way, figures["seconds"][way], round(figures["peak_bytes"][way] / 1e9, 2)]
            for way in WAYS
        ],
    )
    print(f"ratio {figures['ratio']}, from {min(ratios):.3f} to {max(ratios):.3f}")
    save(f"reranking-0.6b-{precision}", figures, results)


def choose_texts(tokenizer: Any) -> tuple[list[str], list[str]]:
    """Built-in queries, and built-in passages of 20 to 700 tokens."""
    from embedport.demo.samples import builtin_pairs, builtin_samples

    samples, pairs = builtin_samples(), builtin_pairs()
    queries = [pair.query for pair in pairs]
    queries += [sample.text for sample in samples if sample.prompt == "query"]
    documents = [sample.text for sample in samples if sample.prompt == "document"]
    documents += [pair.document for pair in pairs]
    low, high = PASSAGE_TOKENS
    passages = [text for text in documents if low <= len(tokenizer.encode(text).ids) <= high]
    return list(dict.fromkeys(queries))[:QUERIES], list(dict.fromkeys(passages))[:PASSAGES]


def serve(folder: str, way: str) -> None:
    """Rank one query's passages a request, the shared way or the main graph's."""
    from embedport.artifact import Artifact
    from embedport.prompts import RerankerTokenizer
    from embedport.runtimes import Reranker, read_facts
    from embedport.runtimes.onnxruntime import OnnxModel

    artifact = Artifact.open(folder)
    assert artifact.manifest.graph is not None
    if way == "plain":
        graph = replace(artifact.manifest.graph, continuation=None)
        artifact = replace(artifact, manifest=replace(artifact.manifest, graph=graph))
    facts = read_facts(folder)
    tokenizer = RerankerTokenizer(facts.folder / "tokenizer.json", facts.max_length)
    reranker = Reranker(facts, OnnxModel(artifact, "cpu"), tokenizer)
    queries, passages = choose_texts(reranker.tokenizer.tokenizer)
    assert (len(queries), len(passages)) == (QUERIES, PASSAGES)
    pairs = [(query, passage) for query in queries for passage in passages]
    tokens = sum(map(len, reranker.tokenizer.encode(pairs).ids))
    print(json.dumps({"ready": repr(reranker), "tokens": tokens}), flush=True)
    for line in sys.stdin:
        query = queries[json.loads(line)["query"]]
        start = time.perf_counter()
        ranking = reranker.rank(query, passages)
        seconds = time.perf_counter() - start
        scores = [each.score for each in sorted(ranking, key=lambda each: each.index)]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        answer = {"seconds": seconds, "scores": scores, "peak_bytes": peak}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(*sys.argv[1:])
