"""How a deployment's folder is made: from artifacts, of templates, whole or not at all."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..artifact.folder import Artifact, staged
from ..checkpoint.hub import fetch
from ..errors import InputError
from ..files import MANIFEST

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
# Bytes of what is written beside copies of artifacts.
SMALL = 10 << 20


def open_artifact(model: str) -> tuple[str, Artifact]:
    """Open an artifact: the name it is deployed by, and the artifact.

    Args:
        model: A folder, or a hub id.

    Raises:
        InputError: It is not an artifact, or its name has other characters than letters, digits,
            ".", "_" and "-".
        ArtifactError: A file is missing or changed.
    """
    source = fetch(model)
    if not (source.folder / MANIFEST).is_file():
        raise InputError(
            f"{model} is a checkpoint: deploy what `embedport export onnx` makes of it"
        )
    folder = Path(model)
    name = folder.resolve().name if folder.is_dir() else model.partition("@")[0].rpartition("/")[2]
    if not NAME.fullmatch(name):
        raise InputError(
            f"{model}: a deployed model's name should be of letters, digits, '.', '_' and '-', "
            f"found {name!r}; rename the folder"
        )
    return name, Artifact.open(source.folder)


@dataclass(frozen=True)
class ServerGraph:
    """The graph that another server's onnxruntime runs.

    Attributes:
        path: Its file.
        inputs: Names of its inputs.
        output: The output with the text's vector or score.
        requires: The onnxruntime that it needs.
    """

    path: Path
    inputs: tuple[str, ...]
    output: str
    requires: str


def pooled_graph(artifact: Artifact) -> ServerGraph:
    """The graph that gives vectors or scores by itself.

    It is the one for older versions of onnxruntime if the artifact has one (`--for triton`,
    `older-onnxruntime` or `tei`): a server's may be older than embedport's own graph needs.

    Raises:
        InputError: The artifact has no graph, or one whose results are pooled outside it.
    """
    graph = artifact.manifest.graph
    if graph is None:
        raise InputError(f"{artifact.folder} has no ONNX graph: make one with `embedport export`")
    if graph.output != "pooled":
        raise InputError(
            f"{artifact.folder}: its graph gives hidden states, and the server would have to pool "
            "them: export it without `outputs` hidden"
        )
    inputs, output, shared = tuple(graph.inputs), graph.outputs[0], graph.shared
    if shared is not None and shared.paths and shared.opset < graph.opset:
        return ServerGraph(artifact.folder / shared.paths[0], inputs, output, shared.requires)
    return ServerGraph(artifact.graph, inputs, output, artifact.manifest.requires)


@contextlib.contextmanager
def deployment(output: Path, artifacts: Sequence[Artifact]) -> Generator[Path]:
    """Yield a folder that becomes `output` if the block ends without an error.

    Raises:
        InputError: `output` exists or cannot be written.
    """
    if output.exists():
        raise InputError(f"{output} exists; choose another place")
    needs = SMALL + sum(artifact.size for artifact in artifacts)
    with staged(output, force=False, needs=needs) as folder:
        yield folder
        for artifact in artifacts:
            artifact.check_unchanged()


def copy_graph(path: Path, folder: Path) -> None:
    """Copy a graph, as model.onnx, and the files of its weights.

    Args:
        path: The graph's file.
        folder: The folder to create.
    """
    import onnx

    folder.mkdir(parents=True)
    shutil.copyfile(path, folder / "model.onnx")
    graph = onnx.load(str(path), load_external_data=False).graph
    for name in {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }:
        shutil.copyfile(path.parent / name, folder / name)


def copy_artifact(artifact: Artifact, folder: Path) -> None:
    """Copy an artifact whole: the files of its manifest, the manifest and the card."""
    for name in (*artifact.manifest.files, MANIFEST, "README.md"):
        source = artifact.folder / name
        if source.is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, folder / name)


def render(template: str, **values: object) -> str:
    """Fill one of the templates beside this module."""
    from jinja2 import Environment, StrictUndefined

    source = (files("embedport.deploy") / "templates" / template).read_text(encoding="utf-8")
    environment = Environment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(**values)


def write(path: Path, text: str) -> None:
    """Write a text file, and create its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
