"""The command line: `embedport VERB …`.

Exit codes: 0 success, 1 a gate failed or a written graph did not run, 2 the request or its input is
wrong. Results go to standard output, messages to standard error.
"""

from __future__ import annotations

from .app import main

__all__ = ["main"]
