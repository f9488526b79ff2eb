"""Every path on this machine's GPU: parity with transformers' fp16, speed, memory, start-up."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from embedport.errors import DeviceError, MissingPackageError, require
from embedport.machine.gpu import call, current_device
from embedport.requirements import installed_versions
from embedport.validation.measures import cosines

from .checkpoint import ROOT, checkpoint, scratch
from .gpu_paths import PAIR, PATHS, REFERENCE
from .machine import describe, print_table

RESULTS = ROOT / "docs" / "gpu-results.json"
SHAPES = ((1, 32), (32, 128), (256, 128), (8, 2048), (1, 8192), (1, 32_000))
MIX_ROWS = 2048
TIMEOUT_SECONDS = 3600
PACKAGES = (
    "torch",
    "transformers",
    "flash-attn",
    "sentence-transformers",
    "vllm",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
)


def measure_paths(source: Path | None = None, results: Path = RESULTS, only: str = "") -> None:
    """Measure each path in its own process and write docs/gpu-results.json.

    Without a GPU nothing is measured, and existing results are kept.

    Args:
        source: An embedding checkpoint; random weights at the 0.6B geometry by default.
        results: The output file.
        only: Measure the paths with this in their name, and the reference; the output file then
            holds no others.
    """
    try:
        machine = _machine()
    except (DeviceError, MissingPackageError) as error:
        print(f"Nothing was measured: {error}")
        if not results.exists():
            row = {"status": "not run", "reason": str(error)}
            _write(results, {"machine": None, "rows": dict.fromkeys(PATHS, row)})
        return
    rows: dict[str, Any] = {}
    with scratch() as folder:
        source = source or checkpoint("0.6b")
        inputs = _write_inputs(source, folder)
        for i, name in enumerate(PATHS):
            if only not in name and name != REFERENCE:
                continue
            place = folder / str(i)
            place.mkdir()
            rows[name] = _run(name, source, inputs, place)
            rows[name] |= _parity(place, folder / "0")
            print(f"{name}: {rows[name]['status']} {rows[name].get('reason', '')}", flush=True)
            # Frees the disk for later paths.
            for artifact in place.rglob("artifact"):
                shutil.rmtree(artifact)
            _write(results, {"machine": machine, "rows": rows})
    _print(rows)


def _machine() -> dict[str, Any]:
    device = current_device()
    _, total = call("cudaMemGetInfo")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split()
    versions = installed_versions(PACKAGES)
    with contextlib.suppress(MissingPackageError):
        # The imported module's version: two packages provide the module.
        versions["onnxruntime"] = require("onnxruntime", "gpu").__version__
    facts = describe()
    return {
        **facts,
        "gpu": device.name,
        "compute_capability": ".".join(map(str, device.capability)),
        "gpu_memory_bytes": int(total),
        "driver": driver[0] if driver else None,
        "versions": facts["versions"] | versions,
    }


def _write_inputs(source: Path, folder: Path) -> Path:
    """Write token ids of real texts: full batches, texts for parity, and a mix of lengths."""
    from embedport.texts.prompts import EmbeddingTokenizer, RerankerTokenizer
    from embedport.texts.samples import builtin_pairs, builtin_samples

    samples = [sample.text for sample in builtin_samples()]
    texts = EmbeddingTokenizer(source / "tokenizer.json", 32768).encode(samples).ids
    stream = np.concatenate(texts)
    arrays = {
        f"{rows}x{tokens}": np.resize(stream, rows * tokens).reshape(rows, tokens)
        for rows, tokens in SHAPES
    }
    pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
    lists = {
        "text": texts,
        "mix": [texts[i % len(texts)] for i in range(MIX_ROWS)],
        "embedding": EmbeddingTokenizer(PAIR["embedding"] / "tokenizer.json", 512)
        .encode(samples)
        .ids,
        "reranker": RerankerTokenizer(PAIR["reranker"] / "tokenizer.json", 512).encode(pairs).ids,
    }
    for name, rows in lists.items():
        arrays[f"{name}_ids"] = np.concatenate(rows)
        arrays[f"{name}_lengths"] = np.array([len(row) for row in rows])
    path = folder / "inputs.npz"
    np.savez(path, allow_pickle=False, **arrays)
    return path


def _run(name: str, source: Path, inputs: Path, place: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.gpu_paths", name, source, inputs, place]
    log = place / "log"
    try:
        with log.open("w") as errors:
            finished = subprocess.run(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=TIMEOUT_SECONDS,
                check=False,
            )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"took more than {TIMEOUT_SECONDS} s"}
    lines = [line for line in finished.stdout.splitlines() if line.startswith("{")]
    if finished.returncode or not lines:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        return {"status": "failed", "reason": f"exit code {finished.returncode}: {' '.join(last)}"}
    return json.loads(lines[-1])


def _parity(place: Path, reference: Path) -> dict[str, Any]:
    """Compare results with the reference's: smallest cosines and the largest score difference."""
    figures: dict[str, Any] = {}
    for key, name, compare in (
        ("minimum_cosine", "vectors", lambda a, b: cosines(a, b).min()),
        ("pair_minimum_cosine", "embedding", lambda a, b: cosines(a, b).min()),
        ("pair_score_difference", "reranker", lambda a, b: np.abs(a - b).max()),
    ):
        paths = [folder / f"{name}.npy" for folder in (place, reference)]
        if all(path.exists() for path in paths):
            figures[key] = float(compare(*map(np.load, paths)))
    return figures


def _write(path: Path, values: dict[str, Any]) -> None:
    facts = {"reference": REFERENCE, "shapes": [f"{a}x{b}" for a, b in SHAPES], **values}
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _print(rows: dict[str, Any]) -> None:
    shapes = [f"{a}x{b}" for a, b in SHAPES] + ["mix"]
    parity = ("minimum_cosine", "pair_minimum_cosine", "pair_score_difference")
    print_table(
        ["tokens/s", *shapes, "cosine", "of the pair", "scores", "GB", "start-up s"],
        [
            [
                name,
                *(row["tokens_per_second"][shape] for shape in shapes),
                *(round(row[key], 6) if key in row else None for key in parity),
                round(row["peak_bytes"] / 1e9, 2),
                row["start_up_seconds"],
            ]
            if row["status"] == "run"
            else [name, f"{row['status']}: {row['reason']}", *[""] * (len(shapes) + 4)]
            for name, row in rows.items()
        ],
    )
