"""`embedport check`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..strict_json import to_json
from ..tables import fact_table
from .inputs import ArtifactArgument, DeviceOption
from .outputs import stdout_console

if TYPE_CHECKING:
    from ..runtimes import Check


def check(
    artifact: ArtifactArgument,
    device: DeviceOption = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare an artifact's vectors here with those of its export; exit code 1 if they differ.

    Needs neither torch nor the checkpoint. Exit code 2: the artifact has no vectors to compare.

    Example: embedport check qwen3-int8
    """
    from ..runtimes import check as run

    result = run(artifact, device=device)
    if as_json:
        typer.echo(to_json(result.to_record()))
    else:
        _print(result)
    raise typer.Exit(0 if result.passed else 1)


def _print(result: Check) -> None:
    from rich.text import Text

    console = stdout_console()
    console.print(
        Text(f"{result.artifact}: {result.verdict}", style="" if result.passed else "red")
    )
    facts = {
        "Compared": result.figures,
        "Exported on": str(result.exported),
        "Here": f"{result.here}; {result.precision} on {result.device}",
    }
    if result.reasons:
        facts["Differs"] = "\n".join(result.reasons)
    elif not result.passed:
        facts["Differs"] = "nothing known: the artifact's files were changed after its export"
    console.print(fact_table(facts))
