"""Quality on the held-out retrieval set: the demo embedder, BM25, and what quantization costs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import CACHE
from .machine import RESULTS, print_table, save

# Name to options of export.
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int8, not rotated": {"precision": "int8", "rotate": False},
    "int8-weight": {"precision": "int8-weight"},
    **{
        f"int4/{group}, {algorithm}": {
            "precision": "int4",
            "group_size": group,
            "algorithm": algorithm,
            "embedding_bits": 8,
        }
        for group in (32, 128)
        for algorithm in ("rtn", "hqq", "gptq", "awq")
    },
    "int4/32, gptq, rotated": {
        "precision": "int4",
        "group_size": 32,
        "algorithm": "gptq",
        "rotate": True,
        "embedding_bits": 8,
    },
    "int4/64, gptq, table 4 bits": {"precision": "int4", "algorithm": "gptq"},
}


def on_the_held_out_set(results: Path = RESULTS) -> None:
    """nDCG@10 of everything on the queries that training has not seen."""
    import embedport
    from embedport.beir import BUILTIN, read_beir
    from embedport.demo.pipeline import builtin_embedder
    from embedport.ranking import measure, rank_documents
    from embedport.validation.retrieval import bootstrap, encode_set

    data = read_beir(BUILTIN)
    names = ("nDCG@10", "R@100", "RR")

    def quality(ranking: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        values = measure(ranking, data.relevance, names)
        kinds = np.array([query.partition("-")[0] for query in ranking])
        by_kind = {
            f"nDCG@10 {kind}": float(values["nDCG@10"][kinds == kind].mean())
            for kind in dict.fromkeys(kinds)
        }
        means = {name: float(each.mean()) for name, each in values.items()}
        return means | by_kind | {"per query": values["nDCG@10"]}

    found: dict[str, dict[str, Any]] = {"BM25": quality(_bm25(data))}
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        vectors = {}
        for i, (name, options) in enumerate(VARIANTS.items()):
            folder = Path(temporary) / str(i)
            artifact = embedport.export(builtin_embedder(), folder, **options)
            embedder = embedport.load(folder, device="cpu")
            assert isinstance(embedder, embedport.Embedder)
            vectors[name] = encode_set(embedder, data, progress=False)
            ranking = rank_documents(vectors[name], embedder.dim, data)
            found[name] = quality(ranking)
            weights = artifact.graph.with_name("model.onnx_data").stat().st_size
            cosines = [
                float((a * b).sum(axis=1).min())
                for a, b in zip(vectors[name], vectors["fp32"], strict=True)
            ]
            found[name] |= {"bytes": weights, "minimum cosine": min(cosines)}
            loss = found["fp32"]["per query"] - found[name]["per query"]
            found[name]["loss"] = float(loss.mean())
            found[name]["loss from to"] = bootstrap(loss)
        width = vectors["fp32"][0].shape[1]
        generator = np.random.default_rng(0)
        for dim in (width // 2, width // 4):
            found[f"first {dim} values"] = quality(rank_documents(vectors["fp32"], dim, data))
            projection = generator.standard_normal((width, dim)).astype(np.float32)
            queries, documents = vectors["fp32"]
            projected = (queries @ projection, documents @ projection)
            found[f"random projection to {dim}"] = quality(rank_documents(projected, dim, data))
    for each in found.values():
        del each["per query"]
    columns = list(dict.fromkeys(key for each in found.values() for key in each))
    print_table(
        ["held-out set", *columns],
        [[name, *(_cell(each.get(key)) for key in columns)] for name, each in found.items()],
    )
    save(
        "retrieval-demo",
        {
            "queries": len(data.queries),
            "documents": len(data.documents),
            "ways": found,
        },
        results,
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " to ".join(f"{each:+.4f}" for each in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _bm25(data: Any) -> dict[str, list[str]]:
    """BM25 with bm25s' defaults and English stop words."""
    import bm25s

    ids = list(data.documents)
    retriever = bm25s.BM25()
    options: dict[str, Any] = {"stopwords": "en", "show_progress": False}
    retriever.index(bm25s.tokenize(list(data.documents.values()), **options), show_progress=False)
    found, _ = retriever.retrieve(
        bm25s.tokenize(list(data.queries.values()), **options), k=100, show_progress=False
    )
    return {
        query: [ids[i] for i in row]
        for query, row in zip(data.queries, found.tolist(), strict=True)
    }
