"""A Triton model repository: a Python model that tokenizes, and the graph that it calls."""

from __future__ import annotations

import shutil
from importlib.resources import files
from pathlib import Path

from ..files import MANIFEST
from ..version import __version__
from .packages import copy_graph, deployment, open_artifact, pooled_graph, render, write

# What the tokenizers read beside tokenizer.json.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEMPLATES = ("chat_template.jinja", "config.json")
WARM_UP = "warm-up"


def deploy_triton(model: str, output: Path) -> None:
    """Write a Triton model repository.

    It has two models: NAME takes texts (a reranker's: queries and documents), and NAME-graph token
    ids. Clients call NAME, whose requests Triton batches.

    Args:
        model: An artifact with a graph: its folder, or a hub id.
        output: The folder to create.

    Raises:
        InputError: The artifact has no pooled graph, or the folder cannot be written.
        ArtifactError: A file of the artifact is missing or changed.
    """
    name, artifact = open_artifact(model)
    graph = pooled_graph(artifact)
    manifest = artifact.manifest
    values = {
        "name": name,
        "graph": f"{name}-graph",
        "task": manifest.task,
        "dim": manifest.embedding_dim,
        "inputs": graph.inputs,
        "output": graph.output,
        "requires": graph.requires,
        "version": __version__,
    }
    with deployment(output, [artifact]) as folder:
        copy_graph(graph.path, folder / f"{name}-graph" / "1")
        write(folder / f"{name}-graph" / "config.pbtxt", render("graph.pbtxt", **values))
        write(folder / name / "config.pbtxt", render("texts.pbtxt", **values))
        write(folder / "README.md", render("triton.md", **values))
        version = folder / name / "1"
        version.mkdir()
        for file in (*TOKENIZER, *TEMPLATES, MANIFEST):
            if (artifact.folder / file).is_file():
                shutil.copyfile(artifact.folder / file, version / file)
        code = (files("embedport.deploy") / "templates" / "model.py").read_text(encoding="utf-8")
        write(version / "model.py", code)
        warm_up = folder / name / "warmup"
        warm_up.mkdir()
        for file in ("query", "document") if manifest.task == "reranker" else ("text",):
            # Triton's form of a string: its length, and its bytes.
            data = len(WARM_UP).to_bytes(4, "little") + WARM_UP.encode()
            (warm_up / file).write_bytes(data)
