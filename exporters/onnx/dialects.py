"""The dialects by their names."""

from __future__ import annotations

from ...errors import InputError
from .dialect import Dialect
from .ort_dialect import OrtDialect
from .standard_dialect import StandardDialect

DIALECTS: dict[str, Dialect] = {each.name: each for each in (OrtDialect(), StandardDialect())}


def find_dialect(name: str) -> Dialect:
    """A dialect by its name.

    Raises:
        InputError: There is none of that name.
    """
    if name not in DIALECTS:
        raise InputError(f"dialect should be one of {', '.join(DIALECTS)}, found {name!r}")
    return DIALECTS[name]
