"""Tables of strings for a terminal, Markdown and HTML."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A table: `console.print(table)`, `table.to_markdown()`, or `page.html.jinja`.

    Attributes:
        header: The columns' names; empty for a list of facts, name and value.
        rows: The rows, as long as the header.
        title: The title; HTML pages have headings of their own.
        failed: Indices of the rows to highlight.
        text: Indices of the columns with words; the others hold figures.
        long: Indices of the columns with long strings that may wrap anywhere.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    title: str = ""
    failed: frozenset[int] = frozenset()
    text: frozenset[int] = frozenset({0})
    long: frozenset[int] = frozenset()

    def to_markdown(self) -> str:
        """The table in Markdown, under its title; highlighted rows are bold."""
        columns = max(map(len, (self.header, *self.rows)))
        lines = [self.header or ("",) * columns, ("---",) * columns]
        for i, row in enumerate(self.rows):
            cells = (cell.replace("|", "\\|").replace("\n", "<br>") for cell in row)
            lines.append(tuple(f"**{cell}**" if i in self.failed else cell for cell in cells))
        title = f"### {self.title}\n\n" if self.title else ""
        return title + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The table for a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable
        from rich.text import Text

        facts = not self.header
        table = RichTable(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            box=None if facts else SIMPLE_HEAD,
            show_header=not facts,
            pad_edge=not facts,
        )
        if facts:
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
        for i, name in enumerate(self.header):
            words = i in self.text or i in self.long
            table.add_column(Text(name), justify="left" if words else "right", overflow="fold")
        for i, row in enumerate(self.rows):
            # Text, not str: rich would read markup in inputs and paths.
            table.add_row(*map(Text, row), style="red" if i in self.failed else None)
        yield table


def fact_table(facts: Mapping[str, str], title: str = "") -> Table:
    """A table of names and values, without a header."""
    return Table((), tuple(facts.items()), title)


def command_words(words: Sequence[str]) -> str:
    """Format a command, or a part of one, for this system's shell.

    Windows' cmd takes single quotes as part of a word.
    """
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)


# A task's input, as count_words takes it.
INPUT = {"embedding": "text", "reranker": "pair"}


def count_words(count: int, one: str, many: str = "") -> str:
    """Format a number of things: 1 text, 2,000 queries."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def size_words(size: int) -> str:
    """Format a number of bytes: 812 B, 11.4 MB, 2.4 GB."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"
