"""A container of `embedport serve`: a Dockerfile, a compose file, and the models beside them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from .packages import copy_artifact, deployment, open_artifact, render, write

PYTHON = "3.12"


def deploy_docker(models: Sequence[str], output: Path, wheel: Path) -> None:
    """Write a folder that `docker compose up` builds and runs.

    Args:
        models: Artifacts with graphs: folders, or hub ids.
        output: The folder to create.
        wheel: embedport's wheel for Linux, as `pip wheel` makes it.

    Raises:
        InputError: The wheel is not one of embedport's, a model is not an artifact that runs on a
            CPU, two have the same name, or the folder cannot be written.
        ArtifactError: A file of an artifact is missing or changed.
    """
    if not (wheel.is_file() and wheel.suffix == ".whl" and wheel.name.startswith("embedport-")):
        raise InputError(
            f"{wheel} should be embedport's wheel: make one by `pip wheel --no-deps -w . CLONE`"
        )
    artifacts = {}
    for model in models:
        name, artifact = open_artifact(model)
        if artifact.manifest.graph is None:
            raise InputError(f"{model} has no ONNX graph, and would need torch in the container")
        if name in artifacts:
            raise InputError(f"two models are named {name}: rename a folder")
        artifacts[name] = artifact
    values = {"models": list(artifacts), "wheel": wheel.name, "python": PYTHON}
    with deployment(output, list(artifacts.values())) as folder:
        for name, artifact in artifacts.items():
            copy_artifact(artifact, folder / "models" / name)
        shutil.copyfile(wheel, folder / wheel.name)
        for name, template in (
            ("Dockerfile", "Dockerfile"),
            ("compose.yaml", "compose.yaml"),
            ("README.md", "docker.md"),
        ):
            write(folder / name, render(template, **values))
        write(folder / ".dockerignore", "*\n!models\n!*.whl\n")
