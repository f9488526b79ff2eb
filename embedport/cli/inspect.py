"""`embedport inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .outputs import size_words, stdout_console

if TYPE_CHECKING:
    from ..spec import ModelSpec

BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


def inspect(
    target: Annotated[
        str, typer.Argument(help="An artifact's or checkpoint's folder, or a hub id.")
    ],
    revision: Annotated[
        str | None, typer.Option(help="A hub revision.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what an artifact or a checkpoint is; an artifact's files are checked.

    Example: embedport inspect Qwen/Qwen3-Embedding-0.6B
    """
    from ..manifest import MANIFEST

    is_artifact = (Path(target).expanduser() / MANIFEST).is_file()
    facts = _artifact(target) if is_artifact else _checkpoint(target, revision)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        _print(facts)


def _artifact(folder: str) -> dict[str, Any]:
    from ..artifact import Artifact

    artifact = Artifact.open(folder)
    manifest = asdict(artifact.manifest)
    files = {name: record["size"] for name, record in manifest.pop("files").items()}
    source = manifest.pop("source")
    parity = manifest.pop("parity")
    return {
        "artifact": folder,
        "files": "all as the manifest says",
        **manifest,
        "source": source["id"] + (f" @ {source['revision']}" if source["revision"] else ""),
        "parity": _verdict(parity),
        "bytes": artifact.size,
        "sizes": files,
    }


def _verdict(parity: dict[str, Any] | None) -> str:
    if parity is None:
        return "not validated"
    figures = parity["comparisons"][0]["figures"] if parity["comparisons"] else {}
    words = ", ".join(
        f"{name} {'NaN' if value is None else format(value, '.7g')}"
        for name, value in figures.items()
    )
    return f"{'holds' if parity['passed'] else 'does not hold'} ({parity['date']}): {words}"


def _checkpoint(target: str, revision: str | None) -> dict[str, Any]:
    from ..spec import ModelSpec

    spec = ModelSpec.from_checkpoint(target, revision=revision)
    facts = asdict(spec)
    source = facts.pop("source")
    return {
        "checkpoint": source["id"],
        "revision": source["revision"],
        **facts,
        "parameters": spec.parameters,
        "bytes": {name: spec.parameters * size for name, size in BYTES.items()},
        "stored": _stored(spec),
    }


def _stored(spec: ModelSpec) -> str:
    """Dtypes and shards, where the weights are on this disk."""
    from ..weights import Weights

    if not any(spec.source.folder.glob("*.safetensors")):
        return "weights not downloaded"
    weights = Weights(spec)
    dtypes = sorted({info.dtype for info in weights.tensors.values()})
    return f"{len(weights.tensors)} tensors in {len(weights.files)} file(s), {', '.join(dtypes)}"


def _print(facts: dict[str, Any]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), Text(_words(name, value)))
    stdout_console().print(table)


def _words(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {_words(name, each)}" for key, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "nothing"
    if name in ("bytes", "sizes"):
        return size_words(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return repr(value) if name == "prompts" else str(value)
