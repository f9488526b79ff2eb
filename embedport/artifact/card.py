"""Renders an artifact's model card: how it was made, how to run it, its parity."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ..machine.engine import EngineRecord
from ..tables import INPUT, count_words, fact_table
from .manifest import GraphRecord, Manifest

GROUPED = re.compile(r"(int[48])/(\d+)(s?)")
NOT_VALIDATED = "Not validated yet: `embedport validate {name} {options}`"


def model_card(manifest: Manifest, name: str, parity_table: str | None = None) -> str:
    """Render README.md.

    Args:
        manifest: The artifact's manifest.
        name: The artifact folder's name.
        parity_table: The last validation's table in Markdown.
    """
    source, recipe = manifest.source, manifest.recipe
    rows = {
        "Source": f"`{source.pinned}`",
        **({"Adapter": f"`{source.adapter.pinned}`, merged"} if source.adapter else {}),
        "Task": manifest.task,
        "Precision": manifest.precision,
        **({"Quantized by": recipe_words(recipe, manifest.task)} if recipe else {}),
        **(_graph_rows(manifest.graph, manifest.precision) if manifest.graph else {}),
        **(_engine_rows(manifest.engine) if manifest.engine else {}),
        "Longest text": f"{manifest.max_length:,} tokens",
        "Runtime": manifest.requires,
        "Made with": ", ".join(f"{key} {value}" for key, value in manifest.versions.items()),
    }
    if manifest.embedding_dim:
        rows["Dimensions"] = str(manifest.embedding_dim)
    parity = parity_table or NOT_VALIDATED.format(name=name, options=" ".join(source.options))
    serving = "\nIn vLLM: [vllm.md](vllm.md).\n" if "vllm.md" in manifest.files else ""
    kinds = {
        "onnx": "An ONNX export",
        "tensorrt": "A TensorRT engine",
        "checkpoint": "A quantized checkpoint",
    }
    return (
        f"{_metadata(manifest, name)}# {name}\n\n"
        f"{kinds[manifest.format]} of a Qwen3 {manifest.task} model by embedport.\n\n"
        f"{fact_table(rows).to_markdown()}\n\n"
        f"## Run it\n\n{_usage(manifest, name)}{serving}\n"
        f"## Parity with the reference\n\n{parity}\n"
    )


def recipe_words(recipe: Mapping[str, Any], task: str) -> str:
    """A manifest's recipe in words: algorithm, rotations, formats, calibration texts or pairs."""
    words = [recipe["algorithm"]]
    words += ["rotated"] if recipe.get("rotate") else []
    words += ["heads rotated"] if recipe.get("rotate_heads") else []
    if recipe.get("arithmetic", "fp32") != "fp32":
        words.append(f"computed in {recipe['arithmetic']}")
    formats = ", ".join(
        f"{count_words(count, 'matrix', 'matrices')} {format_words(text)}"
        for text, count in Counter(recipe["formats"].values()).most_common()
    )
    calibration = recipe.get("calibration")
    texts = ""
    if calibration is not None:
        # Artifacts of before do not count the tokens.
        tokens = f" of {calibration['tokens']:,} tokens" if "tokens" in calibration else ""
        inputs = count_words(calibration["texts"], INPUT[task])
        texts = (
            f"; calibrated on {inputs}{tokens} ({calibration['source']}), "
            f"sha256 {calibration['sha256'][:12]}"
        )
    return f"{', '.join(words)}: {formats}{texts}"


def format_words(text: str) -> str:
    """A format's text in words: "int4/128s" is "int4 in groups of 128, no zero points"."""
    match = GROUPED.fullmatch(text)
    if match is None:
        return text
    bits, group, symmetric = match.groups()
    return f"{bits} in groups of {group}, {'no ' if symmetric else 'with '}zero points"


def task_results(manifest: Manifest) -> list[Any]:
    """The last validation's scores on MTEB's tasks, as the hub's evaluation results.

    Each task has its score, the reference's, and the difference with its interval.
    """
    from huggingface_hub import EvalResult

    results = []
    for row in ((manifest.parity or {}).get("mteb") or {}).get("rows", ()):
        interval = "" if row["low"] is None else f", {row['low']:+.4f} to {row['high']:+.4f} (95 %)"
        names = {
            "artifact": row["measure"],
            "reference": f"{row['measure']} of the reference",
            "difference": f"difference of {row['measure']}{interval}",
        }
        results += [
            EvalResult(
                task_type=row["type"],
                dataset_type=row["dataset"],
                dataset_name=f"MTEB {row['task']}",
                dataset_revision=row["revision"],
                metric_type=row["measure"] if side == "artifact" else f"{row['measure']}_{side}",
                metric_name=metric,
                metric_value=round(row[side], 6),
            )
            for side, metric in names.items()
            if row[side] is not None
        ]
    return results


def _metadata(manifest: Manifest, name: str) -> str:
    """The hub's metadata with the scores on MTEB's tasks, if there are any."""
    results = task_results(manifest)
    if not results:
        return ""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(model_name=name, eval_results=results).to_yaml()}\n---\n\n"


def _graph_rows(graph: GraphRecord, precision: str) -> dict[str, str]:
    parts = ", ".join(f"`{part}`" for part in graph.kept_in_fp32) or "nothing"
    return {
        "Graph": f"`{graph.path}`, {graph.dialect} dialect, ONNX opset {graph.opset}",
        **({"Kept in fp32": parts} if precision in ("fp16", "bf16") else {}),
        "Inputs": ", ".join(
            f"`{name}` int64 {'[1]' if name == 'prompt_length' else '[batch, sequence]'}"
            for name in graph.inputs
        ),
        "Output": ", ".join(f"`{name}`" for name in graph.outputs),
        **({"For": ", ".join(graph.shared.consumers)} if graph.shared else {}),
    }


def _engine_rows(engine: EngineRecord) -> dict[str, str]:
    major = engine.tensorrt.partition(".")[0]
    versions = f" and later {major}.x" if engine.version_compatible else ""
    products = ", ".join(f"{count} in {kind}" for kind, count in engine.products.items())
    return {
        "Engine": f"`{engine.path}`, {engine.builder}{versions}",
        "GPU": engine.targets,
        "Batches": ", ".join(f"`{profile}`" for profile in engine.profiles),
        **({"Products": products} if products else {}),
    }


def _usage(manifest: Manifest, name: str) -> str:
    if manifest.graph is not None and manifest.graph.output == "hidden":
        return (
            "```python\nfrom sentence_transformers import SentenceTransformer\n\n"
            f'model = SentenceTransformer("{name}", backend="onnx")\n```\n'
        )
    if manifest.task == "reranker":
        return (
            "```python\nimport embedport\n\n"
            f'reranker = embedport.load("{name}")\n'
            'reranker.rank("What is the capital of China?", ["Beijing is.", "Paris."], top_k=1)\n'
            "```\n"
        )
    return (
        "```python\nimport embedport\n\n"
        f'embedder = embedport.load("{name}")\n'
        'queries = embedder.encode(["What is the capital of China?"], prompt="query")\n'
        'documents = embedder.encode(["The capital of China is Beijing."], prompt="document")\n'
        "```\n"
    )
