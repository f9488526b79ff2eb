"""The dialects by name."""

from __future__ import annotations

from ...errors import InputError
from .dialect import Dialect
from .older_dialect import OlderDialect
from .ort_dialect import OrtDialect

# For the graph that other software reads, not for embedport's own.
OLDER = OlderDialect()
DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (OrtDialect(), Dialect())}


def find_dialect(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        InputError: The name is unknown.
    """
    if name not in DIALECTS:
        raise InputError(f"dialect should be one of {', '.join(DIALECTS)}, found {name!r}")
    return DIALECTS[name]
