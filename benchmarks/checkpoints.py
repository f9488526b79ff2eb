"""Quantized checkpoints by method: parity and retrieval on the demo pair, size, peak memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from .checkpoint import CACHE, checkpoint, require_space, scratch
from .machine import RESULTS, describe, print_table, read_kept
from .process import ours, run

NAME = "checkpoints"
NOT_RUN = "not run"
RERANKED_QUERIES = 100
# Row to options of the command line.
WAYS = {
    "w8a8": ["--method", "w8a8"],
    "fp8": ["--method", "fp8"],
    "awq": ["--method", "awq"],
    "gptq, 4 bits": ["--method", "gptq"],
    "gptq, 8 bits": ["--method", "gptq", "--bits", "8"],
    "bnb-nf4": ["--method", "bnb-nf4"],
    "bnb-nf4, double": ["--method", "bnb-nf4", "--double-quant"],
    "bnb-int8": ["--method", "bnb-int8"],
}
# Disk space for a folder of the 0.6B geometry and for temporary files of GPTQ and AWQ.
NEEDED_BYTES = 4_000_000_000


def measure_demo_pair(results: Path = RESULTS) -> None:
    """Validate every method for both tasks against the fp32 reference, including retrieval."""
    import embedport
    from embedport.demo.pipeline import builtin_embedder, builtin_reranker
    from embedport.texts.beir import BUILTIN, read_beir

    _read(results)
    # Fewer queries for the reranker, which scores fifty pairs per query.
    sets = {
        "embedding": read_beir(BUILTIN),
        "reranker": read_beir(BUILTIN, max_queries=RERANKED_QUERIES),
    }
    sources = {"embedding": builtin_embedder(), "reranker": builtin_reranker()}
    with scratch() as folder:
        for name, options in WAYS.items():
            row_figures: dict[str, dict[str, Any]] = {}
            for task, source in sources.items():
                out = folder / f"{task}-{name}"
                finished = run(ours("quantize", str(source), "-o", str(out), *options, "--json"))
                report = embedport.validate(out, source, retrieval=sets[task], device="cpu")
                size = json.loads(finished.output.strip().splitlines()[-1])["bytes"]
                figures: dict[str, Any] = {"bytes": size}
                figures |= report.comparisons[0].figures
                if report.retrieval is not None:
                    row = report.retrieval.rows[0]
                    assert row.measure == "nDCG@10"
                    figures |= {"nDCG@10": row.artifact, "reference nDCG@10": row.reference}
                row_figures[task] = figures | {"passed": report.passed}
                shutil.rmtree(out)
            _save("demo", name, row_figures, results)


def measure_0_6b(source: Path | None = None, results: Path = RESULTS) -> None:
    """Time, peak memory and size of quantizing random weights at the 0.6B geometry."""
    _read(results)
    require_space(NEEDED_BYTES)
    source = source or checkpoint("0.6b")
    out = CACHE / "quantized"
    for name, options in WAYS.items():
        shutil.rmtree(out, ignore_errors=True)
        try:
            finished = run(ours("quantize", str(source), "-o", str(out), *options))
            figures = {
                "seconds": round(finished.seconds, 1),
                "peak_gb": round(finished.peak_bytes / 1e9, 3),
                "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
            }
        finally:
            shutil.rmtree(out, ignore_errors=True)
        _save("0.6b", name, {"0.6b": figures}, results)


def _save(part: str, name: str, figures: dict[str, dict[str, Any]], results: Path) -> None:
    """Save figures after each row, so that an aborted run loses only the last one."""
    path = results / f"{NAME}.json"
    saved = _read(results)
    saved.setdefault("machines", {})[part] = describe()
    saved.setdefault("ways", {}).setdefault(name, {}).update(figures)
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(saved, indent=2) + "\n")
    print_table(*_table(saved["ways"]))
    print(f"wrote {path}")


def _read(results: Path) -> dict[str, Any]:
    return read_kept(results / f"{NAME}.json", lambda kept: kept["machines"].values())


def _table(rows: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    columns = {
        "minimum cosine": ("embedding", "minimum cosine", "{:.6f}"),
        "nDCG@10": ("embedding", "nDCG@10", "{:.4f}"),
        "reranker's nDCG@10": ("reranker", "nDCG@10", "{:.4f}"),
        "largest score difference": ("reranker", "maximum score difference", "{:.1e}"),
        "demo embedder, MB": ("embedding", "bytes", "{:.2f}"),
        "0.6B, MB": ("0.6b", "bytes", "{:.0f}"),
        "peak GB": ("0.6b", "peak_gb", "{}"),
        "seconds": ("0.6b", "seconds", "{}"),
    }
    table = []
    for name in WAYS:
        cells = [name]
        for part, key, form in columns.values():
            value = rows.get(name, {}).get(part, {}).get(key)
            if value is not None and key == "bytes":
                value /= 1e6
            cells.append(NOT_RUN if value is None else form.format(value))
        table.append(cells)
    return ["method", *columns], table
