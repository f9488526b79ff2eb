"""The command line: `embedport VERB …`.

Exit codes: 0 success, 1 a gate failed or a written graph did not run, 2 the request or its input is
wrong. Results go to standard output, messages to standard error.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line, whose modules take a moment to import: Ctrl-C comes then, too."""
    try:
        from .app import main as run

        run()
    except KeyboardInterrupt:
        print("embedport: interrupted", file=sys.stderr)  # noqa: T201
        sys.exit(130)


__all__ = ["main"]
