"""Quantized checkpoints in the libraries that own their formats, against this runtime."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import embedport
from embedport.checkpoint.spec import Task
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.texts.samples import builtin_pairs, builtin_samples
from embedport.validation.measures import cosines

from .checkpoint import ROOT, checkpoint, scratch
from .checkpoints import WAYS
from .machine import RESULTS, print_table, read_kept, save
from .process import ours, run, script

NAME = "loaders"
SCRIPT = ROOT / "tests" / "exporters" / "reload.py"
# Texts run one at a time, 150 per method, so only the short ones are used.
LONGEST = 500
TEXTS = [sample.text for sample in builtin_samples() if 0 < len(sample.text) < LONGEST]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs() if len(pair.document) < LONGEST]
# Form of a reranker to what loads it.
RERANKERS = {
    "causal-lm": {"AutoModelForCausalLM": "causal_logits"},
    "sequence-classification": {
        "AutoModelForSequenceClassification": "classifier_logits",
        "CrossEncoder": "cross_encoder_logits",
    },
}
EMBEDDERS = {"AutoModel": "vectors", "SentenceTransformer": "sentence_vectors"}
# Loaders that round activations as this runtime does, which sentence-transformers must be told.
ROUNDED = {
    "SentenceTransformer": "rounded_sentence_vectors",
    "CrossEncoder": "rounded_cross_encoder_logits",
}
# The table's columns: cosines for embedders, score differences for rerankers.
LOADERS = [*EMBEDDERS, *(loader for form in RERANKERS.values() for loader in form)]


def compare_on_demo_pair(results: Path = RESULTS) -> None:
    """Compare every method, task and form, on the trained demo pair."""
    _against_their_owners(
        "demo", {"embedding": builtin_embedder(), "reranker": builtin_reranker()}, results
    )


def compare_on_four_layers(results: Path = RESULTS) -> None:
    """Compare every method, task and form, on four layers of the 0.6B geometry, random weights."""
    sources: dict[Task, Path] = {
        "embedding": checkpoint("0.6b-4"),
        "reranker": checkpoint("0.6b-4", "reranker"),
    }
    _against_their_owners("four layers of 0.6b", sources, results)


def _against_their_owners(model: str, sources: dict[Task, Path], results: Path) -> None:
    """Load each checkpoint in a fresh process, run it in its own dtype, and compare.

    The figure is the smallest cosine with this runtime's vectors for an embedder, and the largest
    score difference for a reranker.
    """
    path = results / f"{NAME}.json"
    figures = read_kept(path, lambda kept: [kept["machine"]]).get("figures", {})
    for method, options in WAYS.items():
        with scratch() as folder:
            figures.setdefault(model, {})[method] = _compare(sources, options, folder)
        # Saved after each row, so that an aborted run loses only the last one.
        save(NAME, {"texts": len(TEXTS), "pairs": len(PAIRS), "figures": figures}, results)
    print_table(
        [model, *LOADERS],
        [
            [method, *(f"{row[loader]:.6f}" for loader in LOADERS)]
            for method, row in figures[model].items()
        ],
    )


def _compare(sources: dict[Task, Path], options: list[str], folder: Path) -> dict[str, float]:
    """Quantize, load in both libraries, and compare: loader to figure."""
    jobs: list[dict[str, Any]] = []
    mine: dict[str, np.ndarray] = {}

    def add(loaders: dict[str, str], out: Path, own: np.ndarray, ids: Any, texts: Any) -> None:
        for key, loader in loaders.items():
            # sentence-transformers reads the prompt and the template from the folder.
            rows = ids if key.startswith("Auto") else texts
            if key in ROUNDED and {"w8a8", "fp8"} & set(options):
                loader = ROUNDED[key]
            jobs.append(
                {"key": key, "loader": loader, "folder": str(out), "rows": rows, "dtype": "auto"}
            )
            mine[key] = own

    out = _quantize(sources["embedding"], folder / "embedder", options)
    embedder = embedport.load_embedder(out, device="cpu")
    ids = embedder.tokenizer.encode(TEXTS, embedder.prompt_text("query")).ids
    own = embedder.encode(TEXTS, prompt="query", batch_tokens=1)
    add(EMBEDDERS, out, own, [row.tolist() for row in ids], TEXTS)
    for form, loaders in RERANKERS.items():
        out = _quantize(sources["reranker"], folder / form, [*options, "--form", form])
        reranker = embedport.load_reranker(out, device="cpu")
        ids = reranker.tokenizer.encode(PAIRS).ids
        own = reranker.score(PAIRS, batch_tokens=1)
        add(loaders, out, own, [row.tolist() for row in ids], PAIRS)
    (folder / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    files = [str(folder / "jobs.json"), str(folder / "out.npz")]
    run(script(SCRIPT, *files) if "gptq" in options else [sys.executable, str(SCRIPT), *files])
    theirs = np.load(folder / "out.npz")
    return {key: _agreement(own, theirs[key]) for key, own in mine.items()}


def _quantize(source: Path, out: Path, options: list[str]) -> Path:
    run(ours("quantize", str(source), "-o", str(out), *options))
    return out


def _agreement(mine: np.ndarray, theirs: np.ndarray) -> float:
    """The smallest cosine of vectors, or the largest score difference (theirs are logits)."""
    if mine.ndim == 2:
        return float(cosines(mine, theirs).min())
    return float(np.abs(mine - 1 / (1 + np.exp(-theirs))).max())
