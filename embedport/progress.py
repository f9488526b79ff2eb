"""Progress bars, shown on a terminal only."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator


@contextlib.contextmanager
def progress_bar(
    description: str, total: int, *, enabled: bool | Callable[[int], None] = True
) -> Generator[Callable[[int], None]]:
    """Show a progress bar on standard error.

    Args:
        description: The bar's label.
        total: Number of steps.
        enabled: Whether to show the bar if standard error is a terminal. Or a function that is
            called with the number of steps instead.

    Yields:
        A function that advances the bar by a number of steps.
    """
    if callable(enabled):
        yield enabled
        return
    if not (enabled and sys.stderr.isatty()):
        yield lambda steps: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
