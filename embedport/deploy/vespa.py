"""A Vespa application's part: the embedder component, and the files it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from xml.sax.saxutils import escape

from ..artifact.manifest import Manifest
from ..errors import InputError
from .packages import copy_graph, deployment, open_artifact, pooled_graph, render, write


def deploy_vespa(model: str, output: Path) -> None:
    """Write the files of a Vespa embedder: services.xml's part and the model's folder.

    Args:
        model: An embedder's artifact with a pooled graph: its folder, or a hub id.
        output: The folder to create, to be merged into an application package.

    Raises:
        InputError: Vespa's embedder cannot do what the model's files ask for, or the folder cannot
            be written.
        ArtifactError: A file of the artifact is missing or changed.
    """
    name, artifact = open_artifact(model)
    graph, manifest = pooled_graph(artifact), artifact.manifest
    _check(model, manifest)
    prompts = {role: manifest.inputs.prompt_text(role) or "" for role in ("query", "document")}
    values = {
        "name": name,
        "dim": manifest.embedding_dim,
        "max_length": manifest.max_length,
        "output": graph.output,
        "requires": graph.requires,
        "prompts": prompts,
        # Vespa puts a space between what it prepends and the text.
        "prepended": {role: escape(text[:-1]) for role, text in prompts.items() if _fits(text)},
        "by_hand": {role: text for role, text in prompts.items() if text and not _fits(text)},
    }
    with deployment(output, [artifact]) as folder:
        copy_graph(graph.path, folder / "models" / name)
        shutil.copyfile(
            artifact.folder / "tokenizer.json", folder / "models" / name / "tokenizer.json"
        )
        write(folder / "services-part.xml", render("services.xml", **values))
        write(folder / "README.md", render("vespa.md", **values))


def _fits(prompt: str) -> bool:
    """Whether Vespa's `prepend` can put this prompt before a text as it is."""
    return prompt.endswith(" ") and prompt[:-1] == prompt[:-1].strip() != ""


def _check(model: str, manifest: Manifest) -> None:
    """Refuse what Vespa's embedder, a plain tokenizer before a graph, does not do."""
    inputs, graph = manifest.inputs, manifest.graph
    assert graph is not None
    obstacles = {
        "it is a reranker, whose template Vespa's embedder does not make": manifest.task
        == "reranker",
        "its inputs are chat messages": inputs.form != "text",
        "its texts are lowercased first": inputs.lower_case,
        "its long texts are cut at the beginning": inputs.truncation_side == "left",
        "its tokenizer splits special tokens in texts": inputs.split_special_tokens,
        "its graph takes the prompt's length": "prompt_length" in graph.inputs,
    }
    for reason, holds in obstacles.items():
        if holds:
            raise InputError(f"{model} does not run in Vespa's hugging-face-embedder: {reason}")
