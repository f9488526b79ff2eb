"""The held-out retrieval set in BEIR layout, with the embedder's candidates."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from transformers import Qwen3Model

from .embedder import Corpus, encode
from .wordnet import Split

CANDIDATES = 50
QUERIES = 1000


def write_retrieval(folder: Path, split: Split, embedder: Qwen3Model, corpus: Corpus) -> None:
    """Write corpus, queries, judgments, and the embedder's top 50 as a reranker's candidates.

    Words are queries for definitions; definitions of other synsets are queries for examples. One
    corpus holds both kinds of documents, and no document is also a query.
    """
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    documents = {synset.id: synset.definition for synset in split.words}
    documents |= {synset.id: synset.examples[0] for synset in split.definitions}
    queries = {f"word-{synset.id}": synset.query for synset in split.words[:QUERIES]}
    # Skip a definition that is also a document (of another synset): it would find itself.
    texts = set(documents.values())
    definition_synsets = [synset for synset in split.definitions if synset.definition not in texts]
    queries |= {
        f"definition-{synset.id}": synset.definition for synset in definition_synsets[:QUERIES]
    }
    ids_of: dict[str, list[str]] = {}
    for key, text in documents.items():
        ids_of.setdefault(text, []).append(key)
    qrels = [
        (query, key, "1") for query in queries for key in ids_of[documents[query.partition("-")[2]]]
    ]
    _write_texts(folder / "corpus.jsonl.gz", documents)
    _write_texts(folder / "queries.jsonl.gz", queries)
    _write_tsv(folder / "qrels" / "test.tsv", [("query-id", "corpus-id", "score"), *qrels])
    document_vectors = torch.from_numpy(
        encode(embedder, [corpus.documents[t] for t in documents.values()])
    )
    query_vectors = torch.from_numpy(
        encode(embedder, [corpus.queries[t] for t in queries.values()], corpus.prompt)
    )
    keys = list(documents)
    best = (query_vectors @ document_vectors.T).topk(CANDIDATES).indices.tolist()
    candidates = [
        (query, keys[i], str(rank))
        for query, row in zip(queries, best, strict=True)
        for rank, i in enumerate(row, 1)
    ]
    _write_tsv(folder / "candidates.tsv.gz", [("query-id", "corpus-id", "rank"), *candidates])


def _write_texts(path: Path, texts: Mapping[str, str]) -> None:
    _write(
        path,
        "".join(
            json.dumps({"_id": key, "text": text}, ensure_ascii=False) + "\n"
            for key, text in texts.items()
        ),
    )


def _write_tsv(path: Path, rows: Iterable[tuple[str, ...]]) -> None:
    _write(path, "".join("\t".join(row) + "\n" for row in rows))


def _write(path: Path, text: str) -> None:
    data = text.encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
