"""`embedport deploy triton`, `docker` and `vespa`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tables import command_words
from .inputs import ArtifactArgument

Out = Annotated[Path, typer.Option("-o", "--out", "--output", help="The folder to make.")]


def triton(artifact: ArtifactArgument, out: Out) -> None:
    """Make a Triton model repository: texts in, vectors or scores out.

    Example: embedport deploy triton qwen3-fp16 -o repository
    """
    from ..deploy import deploy_triton

    deploy_triton(artifact, out)
    _say(out, f"tritonserver --model-repository {command_words([str(out)])}")


def docker(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT…", help="Artifacts' folders, or hub ids.")
    ],
    out: Out,
    wheel: Annotated[
        Path, typer.Option(help="embedport's wheel for Linux: pip wheel --no-deps -w . CLONE")
    ],
) -> None:
    """Make a Dockerfile and a compose file of `embedport serve`, with the models beside them.

    Example: embedport deploy docker qwen3-int8 reranker-int8 -o service --wheel embedport.whl
    """
    from ..deploy import deploy_docker

    deploy_docker(artifacts, out, wheel)
    start = f"cd {command_words([str(out)])} && docker compose up --build --wait"
    typer.echo(f"{out}: written; then, with a key in $EMBEDPORT_API_KEY: {start}", err=True)


def vespa(artifact: ArtifactArgument, out: Out) -> None:
    """Make a Vespa embedder: a part of services.xml, and the model's files.

    Example: embedport deploy vespa qwen3-int8 -o vespa
    """
    from ..deploy import deploy_vespa

    deploy_vespa(artifact, out)
    _say(out, f"see {out / 'README.md'}")


def _say(out: Path, then: str) -> None:
    typer.echo(f"{out}: written; then: {then}", err=True)
