"""Fixtures of the command line's tests."""

import re
import sys

import pytest

from embedport.cli import main

STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def run(monkeypatch, capsys):
    """A function (arguments, stdin) -> (exit code, standard output, standard error).

    With `terminal`, standard output is a terminal of 60 columns.
    """

    def call(*arguments, stdin=None, terminal=False):
        import io

        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        monkeypatch.setenv("COLUMNS", "60" if terminal else "80")

        monkeypatch.setattr(sys, "argv", ["embedport", *map(str, arguments)])
        buffer = io.BytesIO((stdin or "").encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(buffer, encoding="utf-8"))
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return ended.value.code or 0, STYLE.sub("", captured.out), captured.err

    return call
