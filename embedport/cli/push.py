"""`embedport push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..tables import size_words


def push(
    artifact: Annotated[Path, typer.Argument(help="An artifact's folder.")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the hub.")],
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository.")
    ] = None,
    license: Annotated[
        str | None, typer.Option(help="Its license; default: the base model's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be sent.")
    ] = False,
) -> None:
    """Publish an artifact on the Hugging Face hub, with its card; without a token, only show it.

    Example: embedport push qwen3-int8 me/qwen3-int8
    """
    from ..artifact.push import has_token, prepare
    from ..artifact.push import push as send

    publication = prepare(artifact, repository, license=license)
    sends = not dry_run and has_token()
    if "\nlicense:" not in publication.card:
        typer.echo(
            "embedport: the card names no license: the base model's is not known; give --license",
            err=True,
        )
    if not sends:
        why = "" if dry_run else "no token (hf auth login, or HF_TOKEN), so "
        typer.echo(f"embedport: {why}nothing is sent; this would be", err=True)
        for name, path in publication.files.items():
            typer.echo(f"{name}  {size_words(path.stat().st_size)}")
        typer.echo(f"embedport.json  {size_words(len(publication.manifest.encode()))}")
        typer.echo(f"README.md  {size_words(len(publication.card.encode()))}\n")
        typer.echo(publication.card)
        return
    address = send(publication, private=private)
    typer.echo(f"{repository}: {size_words(publication.size)} sent", err=True)
    typer.echo(address)
