"""The command line: `embedport VERB …`.

Exit codes: 0 good, 1 a gate failed or a written graph did not run, 2 the request or its input is
wrong. What a program reads goes to standard output, everything else to standard error.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
