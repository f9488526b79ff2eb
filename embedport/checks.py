"""Options that are numbers: integers and limits, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from .errors import InputError

# Options that are limits, and what a limit can be: any other, as NaN, always holds or never does.
LIMITS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "min_cosine": ("above 0 and at most 1", lambda limit: 0 < limit <= 1),
    "max_score_difference": ("0 or more", lambda limit: 0 <= limit < math.inf),
    "max_ndcg_loss": ("from 0 to 1", lambda limit: 0 <= limit <= 1),
    "max_bytes": ("above 0", lambda limit: 0 < limit < math.inf),
    "average_bits": ("above 0", lambda limit: 0 < limit < math.inf),
}


def check_integer(name: str, value: object) -> int:
    """Refuse an option that should be an integer and is not; True would count as 1.

    Returns:
        Python's own integer: numpy's cannot be written as JSON.

    Raises:
        InputError: It is not.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise InputError(f"{name} should be an integer, found {value!r}")
    return int(value)


def check_limit(name: str, value: object) -> float | None:
    """Refuse an option of `LIMITS` that cannot limit anything.

    Returns:
        Python's own number, as `check_integer`; None for None.

    Raises:
        InputError: It is no number, or out of range.
    """
    if value is None:
        return None
    words, holds = LIMITS[name]
    if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
        raise InputError(f"{name} should be {words}, found {value!r}")
    return int(value) if isinstance(value, Integral) else float(value)


def check_numbers(options: object, *integers: str) -> None:
    """Check a dataclass's options that are numbers and given, and make them Python's own.

    Args:
        options: The dataclass, which may be frozen.
        integers: The names of options that are integers; those of `LIMITS` are limits.

    Raises:
        InputError: See `check_integer` and `check_limit`.
    """
    for name in (*integers, *LIMITS):
        if (value := getattr(options, name, None)) is not None:
            check = check_limit if name in LIMITS else check_integer
            object.__setattr__(options, name, check(name, value))
