"""Artifacts in the software around them, each in an environment of its own: docs/compatibility.md.

uv makes the Python environments; npm installs the packages for JavaScript below build/benchmarks.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import CACHE, ROOT
from .machine import RESULTS, read_kept, save

FIGURES = "compatibility.json"
SCRIPTS = Path(__file__).with_name("consumers")
PAGE = ROOT / "docs" / "compatibility.md"
MARKS = ("<!-- table -->", "<!-- end of the table -->")
# In the same precision: the smallest cosine, and the largest difference of a score. 4-bit and 8-bit
# products round activations, and each runtime does so in another order: one changed code moves a
# score of the demo reranker by 0.007, and int8 itself by 0.02 from fp32.
MIN_COSINE = 0.9999
MOST_APART = {"fp32": 1e-4, "fp16": 1e-3, "int8": 2e-2, "int4": 2e-2}
TORCH = "torch==2.15.0"
# The last versions that go together: optimum-onnx takes transformers 4.
OPTIMUM = ("sentence-transformers[onnx]<6", "optimum-onnx[onnxruntime]", "transformers<4.58", TORCH)
OPENVINO = ("sentence-transformers[openvino]", "optimum-intel[openvino]", TORCH)
NODE = ("@huggingface/transformers@4.3.2", "onnxruntime-node@1.30.0", "onnxruntime-web@1.30.0")
# Versions of onnxruntime, and software that does not run here and has them inside.
INSIDE = {
    "1.20.1": "Triton 24.x, Jetson",
    "1.22.1": "text-embeddings-inference 1.9",
    "1.23.2": "",
    "1.24.4": "",
    "1.26.0": "Vespa",
    "1.27.0": "",
    "1.28.0": "",
    "1.32.0": "",
}
# One artifact for all of these, by task: rerankers are refused by transformers.js and fastembed.
ALL = "all five"
TARGETS = {
    "embedding": (
        *("sentence-transformers", "transformers.js", "fastembed", "openvino"),
        "older-onnxruntime",
    ),
    "reranker": ("sentence-transformers", "openvino", "older-onnxruntime"),
}
TEXTS = 16
BOTH = ("embedding", "reranker")


@dataclass(frozen=True)
class Row:
    """One consumer, and what it is given.

    Attributes:
        name: The consumer, as its user calls it.
        target: The `--for` of the artifact, or `ALL`; empty for the default artifact.
        script: The script's name in consumers/; None if it cannot run here.
        packages: What its environment takes; for a .mjs script, the npm package that is named.
        arguments: Further arguments of the script.
        precisions: The artifacts' precisions.
        tasks: The artifacts' tasks.
        options: Further options of the export.
        reason: Why it is not run.
    """

    name: str
    target: str
    script: str | None = None
    packages: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32",)
    tasks: tuple[str, ...] = ("embedding",)
    options: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


ROWS = (
    *(
        Row(
            f"onnxruntime {version}" + (f" (that of {inside})" if inside else ""),
            "older-onnxruntime" if version < "1.28" else "",
            "onnxruntime_.py",
            (f"onnxruntime=={version}", "numpy"),
            precisions=("fp32", "fp16", "int8", "int4"),
            tasks=BOTH,
        )
        for version, inside in INSIDE.items()
    ),
    Row(
        '`SentenceTransformer(…, backend="onnx")`, `CrossEncoder(…, backend="onnx")`',
        "sentence-transformers",
        "sentence_transformers_.py",
        OPTIMUM,
        ("onnx",),
        precisions=("fp32", "int8"),
        tasks=BOTH,
    ),
    Row(
        "optimum `ORTModelForFeatureExtraction`, `ORTModelForSequenceClassification`",
        "sentence-transformers",
        "optimum_.py",
        OPTIMUM,
        tasks=BOTH,
    ),
    Row(
        "LangChain `HuggingFaceEmbeddings`",
        "sentence-transformers",
        "langchain_.py",
        ("langchain-huggingface", *OPTIMUM),
    ),
    Row(
        "LlamaIndex `HuggingFaceEmbedding`",
        "sentence-transformers",
        "llama_index_.py",
        ("llama-index-embeddings-huggingface", *OPTIMUM),
    ),
    Row(
        "Haystack `SentenceTransformersTextEmbedder`",
        "sentence-transformers",
        "haystack_.py",
        ("haystack-ai<3", *OPTIMUM),
    ),
    Row(
        'the same classes with `backend="openvino"` and the hint f32',
        "openvino",
        "sentence_transformers_.py",
        OPENVINO,
        ("openvino",),
        tasks=BOTH,
    ),
    Row(
        "OpenVINO, `INFERENCE_PRECISION_HINT` f32",
        "openvino",
        "openvino_.py",
        ("openvino", "numpy"),
        ("f32",),
        precisions=("fp32", "fp16"),
        tasks=BOTH,
    ),
    Row(
        "OpenVINO, quantized (`--dialect standard`)",
        "openvino",
        "openvino_.py",
        ("openvino", "numpy"),
        ("f32",),
        precisions=("int8",),
        options={"dialect": "standard"},
    ),
    Row("fastembed, a custom model", "fastembed", "fastembed_.py", ("fastembed",), (),
        ("fp32", "int8", "int4")),
    Row(
        "transformers.js (Node.js)",
        "transformers.js",
        "transformers_js.mjs",
        ("@huggingface/transformers",),
        precisions=("fp32", "fp16", "int8", "int4"),
    ),
    Row("onnxruntime-node", "", "onnxruntime_js.mjs", ("onnxruntime-node",), ("node",),
        ("fp32", "int8", "int4"), BOTH),
    Row("onnxruntime-web (wasm, in Node.js)", "", "onnxruntime_js.mjs", ("onnxruntime-web",),
        ("web",), ("fp32", "int8"), BOTH),
    Row("one artifact: sentence-transformers", ALL, "sentence_transformers_.py", OPTIMUM,
        ("onnx",), tasks=BOTH),
    Row("one artifact: transformers.js", ALL, "transformers_js.mjs",
        ("@huggingface/transformers",)),
    Row("one artifact: fastembed", ALL, "fastembed_.py", ("fastembed",)),
    Row("one artifact: OpenVINO", ALL, "openvino_.py", ("openvino", "numpy"), ("f32",),
        tasks=BOTH),
    Row("one artifact: onnxruntime 1.20.1", ALL, "onnxruntime_.py",
        ("onnxruntime==1.20.1", "numpy"), tasks=BOTH),
    Row("infinity-emb", "sentence-transformers", reason="it pools by mean or first token only"),
    Row("text-embeddings-inference", "tei", reason="a Rust program; its onnxruntime runs above"),
    Row("Triton", "triton", reason="an image of its own; its onnxruntime runs above"),
    Row("Vespa", "older-onnxruntime", reason="a Java server; its onnxruntime runs above"),
    Row("onnxruntime on Jetson", "older-onnxruntime", reason="no such device"),
)  # fmt: skip


def run_consumers(results: Path = RESULTS, only: Sequence[str] = ()) -> None:
    """Run every row, save the figures, and write the table into docs/compatibility.md.

    Args:
        results: The folder of the figures.
        only: Run the rows whose names contain one of these; the others keep their figures.
    """
    figures = {
        _key(figure): figure
        for figure in read_kept(results / FIGURES, lambda saved: [saved["machine"]]).get("rows", [])
    }
    folder = CACHE / "compatibility"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made: dict[str, Path] = {}
    for row in ROWS:
        if only and row.script and not any(text in row.name for text in only):
            continue
        for task, precision in _cases(row):
            figure = _figure(row, task, precision, folder, made)
            print(json.dumps(figure), flush=True)
            figures[_key(figure)] = figure
        save("compatibility", {"rows": _in_order(figures)}, results)
    _write_page(_in_order(figures))


def _cases(row: Row) -> list[tuple[str, str]]:
    """The tasks and precisions of a row."""
    return [(task, one) for task in row.tasks for one in (row.precisions if row.script else ("",))]


def _in_order(figures: dict[tuple[str, str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """The figures in the order of the rows, without those of rows that are no more."""
    keys = [(row.name, *case) for row in ROWS for case in _cases(row)]
    return [figures[key] for key in keys if key in figures]


def _key(figure: dict[str, Any]) -> tuple[str, str, str]:
    return figure["consumer"], figure["task"], figure["precision"]


def _figure(
    row: Row, task: str, precision: str, folder: Path, made: dict[str, Path]
) -> dict[str, Any]:
    figure: dict[str, Any] = {
        "consumer": row.name,
        "for": row.target,
        "task": task,
        "precision": precision,
        "versions": {},
    }
    if row.script is None:
        return figure | {"result": "not run", "reason": row.reason}
    artifact = _artifact(row, task, precision, folder, made)
    inputs, expected = artifact.with_suffix(".json"), np.load(artifact.with_suffix(".npy"))
    try:
        if row.script.endswith(".mjs"):
            values, versions = _run_node(row, artifact, inputs, folder)
        else:
            values, versions = _run_python(row, artifact, inputs, folder)
    except (OSError, RuntimeError) as error:
        words = re.sub(r"\s+", " ", str(error))[-300:]
        return figure | {"result": "not run", "reason": words}
    if task == "embedding":
        units = values / np.linalg.norm(values, axis=-1, keepdims=True)
        measured = float((units * expected).sum(axis=-1).min())
        right = measured >= MIN_COSINE
        figures = {"minimum_cosine": measured}
    else:
        measured = float(np.abs(values - expected).max())
        right = measured <= MOST_APART[precision]
        figures = {"largest_difference": measured}
    return figure | {"versions": versions, "result": "right" if right else "wrong", **figures}


def _artifact(row: Row, task: str, precision: str, folder: Path, made: dict[str, Path]) -> Path:
    """The artifact of a row, with the inputs and our own results beside it."""
    import embedport
    from embedport.demo.pipeline import builtin_embedder, builtin_reranker
    from embedport.texts.samples import builtin_pairs, builtin_samples

    key = f"{task}-{precision}-{row.target.replace(' ', '-') or 'default'}"
    if key in made:
        return made[key]
    artifact = folder / key
    source = builtin_embedder() if task == "embedding" else builtin_reranker()
    targets = TARGETS[task] if row.target == ALL else [row.target] if row.target else []
    embedport.export(source, artifact, precision=precision, consumers=targets, **row.options)
    model = embedport.load(artifact, device="cpu")
    values: dict[str, Any]
    if isinstance(model, embedport.Embedder):
        texts = [sample.text for sample in builtin_samples()[:TEXTS]]
        prompt = model.prompts["query"]
        values = {"texts": texts, "prompt": prompt}
        rows = model.tokenizer.encode(texts, prompt).ids
        expected = model.encode(texts, prompt="query")
    else:
        pairs = [(pair.query, pair.document) for pair in builtin_pairs()[:TEXTS]]
        values = {"pairs": pairs}
        rows = model.tokenizer.encode(pairs).ids
        expected = model.score(pairs)
    values["ids"] = [ids.tolist() for ids in rows]
    artifact.with_suffix(".json").write_text(json.dumps(values), encoding="utf-8")
    np.save(artifact.with_suffix(".npy"), expected)
    made[key] = artifact
    return artifact


def _run_python(
    row: Row, artifact: Path, inputs: Path, folder: Path
) -> tuple[np.ndarray, dict[str, str]]:
    environment = [
        *("uv", "run", "--quiet", "--no-project", "--isolated", "--python", "3.11"),
        *(argument for package in row.packages for argument in ("--with", package)),
    ]
    output = folder / "output.npz"
    output.unlink(missing_ok=True)
    script = SCRIPTS / str(row.script)
    arguments = [str(artifact), str(inputs), str(output), *row.arguments]
    _run([*environment, "python", str(script), *arguments])
    return np.load(output)["values"], _versions(row.packages, tuple(environment))


@cache
def _versions(packages: tuple[str, ...], environment: tuple[str, ...]) -> dict[str, str]:
    """The versions of the packages in an environment."""
    names = [re.split(r"[\[<=]", package)[0] for package in packages]
    code = (
        "import importlib.metadata as m, json, sys;"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    return json.loads(_run([*environment, "python", "-c", code, *names]).splitlines()[-1])


def _run_node(
    row: Row, artifact: Path, inputs: Path, folder: Path
) -> tuple[np.ndarray, dict[str, str]]:
    modules = CACHE / "node" / "node_modules"
    if not modules.is_dir():
        if shutil.which("npm") is None:
            raise RuntimeError("npm is not installed")
        # The scripts fetch CUDA's libraries.
        _run(["npm", "install", "--prefix", str(modules.parent), "--ignore-scripts", *NODE])
    output = folder / "output.json"
    output.unlink(missing_ok=True)
    paths = [str(path) for path in (modules, artifact, inputs, output)]
    _run(["node", str(SCRIPTS / str(row.script)), *paths, *row.arguments])
    versions = {
        name: json.loads((modules / name / "package.json").read_text())["version"]
        for name in row.packages
    }
    return np.array(json.loads(output.read_text())), versions


def _run(command: list[str]) -> str:
    """Run a command; return its output.

    Raises:
        RuntimeError: It failed; with the end of its output.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout)[-2000:])
    return done.stdout


def _write_page(figures: Sequence[dict[str, Any]]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    text = f"{before}{MARKS[0]}\n\n{_table(figures)}\n\n{MARKS[1]}{after}"
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)


def _table(figures: Sequence[dict[str, Any]]) -> str:
    """One line for a consumer: its versions, and the figure of each precision and task."""
    lines = ["| consumer | `--for` | embedder: smallest cosine | reranker: largest difference |"]
    lines.append("| --- | --- | --- | --- |")
    by_consumer: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for figure in figures:
        by_consumer.setdefault((figure["consumer"], figure["for"]), []).append(figure)
    for (consumer, target), own in by_consumer.items():
        versions = next((figure["versions"] for figure in own if figure["versions"]), {})
        words = ", ".join(
            f"{name} {version}" for name, version in versions.items() if name in SHOWN
        )
        cells = [_cell([figure for figure in own if figure["task"] == task]) for task in BOTH]
        name = f"{consumer}; {words}" if words else consumer
        lines.append(f"| {name} | {_shown_target(target)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown_target(target: str) -> str:
    if target in ("", ALL):
        return target or "not needed"
    return f"`{target}`"


SHOWN = (
    *("sentence-transformers", "optimum-onnx", "optimum-intel", "openvino"),
    *("fastembed", "langchain-huggingface", "llama-index-embeddings-huggingface", "haystack-ai"),
    *("@huggingface/transformers", "onnxruntime-node", "onnxruntime-web"),
)


def _cell(figures: Sequence[dict[str, Any]]) -> str:
    words: list[str] = []
    formats: dict[str, Callable[[float], str]] = {
        "minimum_cosine": lambda value: f"{value:.7f}",
        "largest_difference": lambda value: f"{value:.1e}",
    }
    for figure in figures:
        if figure["result"] == "not run":
            words.append(f"not run: {figure['reason']}")
            continue
        key = next(name for name in formats if name in figure)
        wrong = "" if figure["result"] == "right" else " (wrong)"
        words.append(f"{figure['precision']} {formats[key](figure[key])}{wrong}")
    return "; ".join(dict.fromkeys(words)) or "—"
