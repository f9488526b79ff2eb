"""Quality on the held-out retrieval set: the demo pair, BM25, and the loss by quantization."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .checkpoint import scratch
from .machine import RESULTS, print_table, save

if TYPE_CHECKING:
    from embedport import Artifact
    from embedport.texts.beir import RetrievalSet

# Name of each variant to its export options.
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
            "rotate": False,
        }
        for group in (32, 128)
        for algorithm in ("rtn", "mse", "gptq", "awq")
    },
    "int4/32, gptq, rotated": {
        "precision": "int4",
        "group_size": 32,
        "algorithm": "gptq",
        "rotate": True,
    },
    **{
        f"int4/{group}, {algorithm}, table 4 bits": {
            "precision": "int4",
            "group_size": group,
            "algorithm": algorithm,
            "rotate": False,
            "embedding_bits": 4,
        }
        for group, algorithm in ((32, "gptq"), (64, "gptq"), (64, "rtn"))
    },
}


RERANKERS = {name: VARIANTS[name] for name in ("fp32", "int8", "int8-weight", "int4/32, gptq")}
# int8 on a checkpoint with planted outliers: with balancing, rotation, both and neither.
PLANTED: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32"},
    "int8": {"precision": "int8"},
    "int8, not rotated": {"precision": "int8", "rotate": False},
    "int8, rotated only": {"recipe": {"balance": False, "rotate": True}},
    "int8, neither": {"recipe": {"balance": False, "rotate": False}},
}
Quality = dict[str, Any]


def measure_retrieval(results: Path = RESULTS) -> None:
    """Measure retrievers, rerankers and their variants on queries held out from training."""
    from embedport.demo.pipeline import builtin_embedder
    from embedport.texts.beir import BUILTIN, read_beir
    from tests.synthetic import plant_outliers

    retrieval_set = read_beir(BUILTIN)
    with scratch() as folder:
        held_out = {
            "BM25": quality(_bm25(retrieval_set), retrieval_set),
            **_embedders(builtin_embedder(), VARIANTS, retrieval_set, folder, reference=True),
        }
        planted = Path(shutil.copytree(builtin_embedder(), folder / "planted"))
        plant_outliers(planted)
        tables = {
            "held-out set": held_out,
            "outliers planted": _embedders(planted, PLANTED, retrieval_set, folder),
            "reranked": _rerankers(retrieval_set, folder),
        }
    for name, rows in tables.items():
        for row in rows.values():
            row.pop("per query")
        columns = list(dict.fromkeys(key for row in rows.values() for key in row))
        print_table(
            [name, *columns],
            [[way, *(_cell(row.get(key)) for key in columns)] for way, row in rows.items()],
        )
    sizes = {"queries": len(retrieval_set.queries), "documents": len(retrieval_set.documents)}
    save("retrieval-demo", sizes | {"ways": tables}, results)


def quality(ranking: Mapping[str, Sequence[str]], data: RetrievalSet) -> Quality:
    """Mean measures over all queries, nDCG@10 by kind of query, and nDCG@10 query by query."""
    from embedport.texts.ranking import measure

    values = measure(ranking, data.relevance, ("nDCG@10", "R@100", "RR"))
    kinds = np.array([query.partition("-")[0] for query in ranking])
    by_kind = {
        f"nDCG@10 {kind}": float(values["nDCG@10"][kinds == kind].mean())
        for kind in sorted(dict.fromkeys(kinds))
    }
    means = {name: float(per_query.mean()) for name, per_query in values.items()}
    return means | by_kind | {"per query": values["nDCG@10"]}


def _embedders(
    checkpoint: Path,
    variants: Mapping[str, dict[str, Any]],
    data: RetrievalSet,
    folder: Path,
    *,
    reference: bool = False,
) -> dict[str, Quality]:
    """Quality of each variant; with `reference`, also of transformers and narrower vectors."""
    import embedport
    from embedport.texts.ranking import rank_documents
    from embedport.validation.opening import open_live
    from embedport.validation.retrieval import encode_set

    qualities: dict[str, Quality] = {}
    vectors = {}
    for name, options in variants.items():
        artifact = _export(checkpoint, options, folder)
        embedder = embedport.load_embedder(artifact.folder, device="cpu")
        vectors[name] = encode_set(embedder, data, progress=False)
        qualities[name] = quality(rank_documents(vectors[name], embedder.dim, data), data)
        cosines = [
            float((a * b).sum(axis=1).min())
            for a, b in zip(vectors[name], vectors["fp32"], strict=True)
        ]
        qualities[name] |= {"bytes": _bytes(artifact), "minimum cosine": min(cosines)}
        qualities[name] |= _loss(qualities[name], qualities["fp32"])
    if not reference:
        return qualities
    width = vectors["fp32"][0].shape[1]
    source = open_live(checkpoint, task="embedding", max_length=512, device="cpu")
    expected = source.encode_set(data, "fp32")
    qualities["transformers, fp32"] = quality(rank_documents(expected, width, data), data)
    generator = np.random.default_rng(0)
    for dim in (width // 2, width // 4):
        qualities[f"first {dim} values"] = quality(rank_documents(vectors["fp32"], dim, data), data)
        projection = generator.standard_normal((width, dim)).astype(np.float32)
        queries, documents = vectors["fp32"]
        projected = (queries @ projection, documents @ projection)
        qualities[f"random projection to {dim}"] = quality(
            rank_documents(projected, dim, data), data
        )
    return qualities


def _rerankers(data: RetrievalSet, folder: Path) -> dict[str, Quality]:
    """Quality of the embedder's top 50 in their given order, and reranked by each variant."""
    import embedport
    from embedport.demo.pipeline import builtin_reranker
    from embedport.texts.ranking import rank_candidates
    from embedport.validation.opening import open_live
    from embedport.validation.retrieval import score_set

    before = {query: data.candidates[query] for query in data.queries}
    qualities = {"as they came": quality(before, data)}
    for name, options in RERANKERS.items():
        artifact = _export(builtin_reranker(), options, folder)
        reranker = embedport.load_reranker(artifact.folder, device="cpu")
        scores = score_set(reranker, data, progress=False)
        qualities[name] = quality(rank_candidates(before, scores), data)
        qualities[name] |= {"bytes": _bytes(artifact)} | _loss(qualities[name], qualities["fp32"])
    qualities["as they came"] |= _loss(qualities["as they came"], qualities["fp32"])
    source = open_live(builtin_reranker(), task="reranker", max_length=512, device="cpu")
    scores = source.score_set(data, "fp32")
    qualities["transformers, fp32"] = quality(rank_candidates(before, scores), data)
    return qualities


def _export(checkpoint: Path, options: dict[str, Any], folder: Path) -> Artifact:
    """Export to a new folder; a variant with a partial recipe overrides int8's recipe."""
    import embedport

    out = folder / f"{len(list(folder.iterdir()))}"
    if "recipe" not in options:
        return embedport.export(checkpoint, out, **options)
    int8 = embedport.export(checkpoint, out.with_name(f"{out.name}-int8"), precision="int8")
    recipe = folder / "recipe.json"
    recipe.write_text(json.dumps((int8.manifest.recipe or {}) | options["recipe"]))
    return embedport.export(checkpoint, out, recipe=recipe)


def _bytes(artifact: Artifact) -> int:
    return artifact.graph.with_name("model.onnx_data").stat().st_size


def _loss(variant: Quality, fp32: Quality) -> dict[str, Any]:
    from embedport.validation.retrieval import bootstrap

    loss = fp32["per query"] - variant["per query"]
    return {"loss": float(loss.mean()), "loss from to": bootstrap(loss)}


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return " to ".join(f"{bound:+.4f}" for bound in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _bm25(data: RetrievalSet) -> dict[str, list[str]]:
    """BM25 with bm25s' defaults and English stop words."""
    import bm25s

    ids = list(data.documents)
    retriever = bm25s.BM25()
    options: dict[str, Any] = {"stopwords": "en", "show_progress": False}
    retriever.index(bm25s.tokenize(list(data.documents.values()), **options), show_progress=False)
    best, _ = retriever.retrieve(
        bm25s.tokenize(list(data.queries.values()), **options), k=100, show_progress=False
    )
    return {
        query: [ids[i] for i in row] for query, row in zip(data.queries, best.tolist(), strict=True)
    }
