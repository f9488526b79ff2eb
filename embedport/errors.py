"""All exceptions that embedport raises on purpose.

    EmbedportError
      InputError        the request is wrong: a text, an option, a path          exit code 2
      CheckpointError   the source checkpoint is not what it should be           exit code 2
      ArtifactError     the artifact folder is damaged, incomplete or too new    exit code 2
      DeviceError       the chosen device cannot run the artifact here           exit code 2
      MissingPackageError    an optional package is needed; names the install line    exit code 2
      VerificationError an artifact just written does not run or gives NaN or
                        infinity, or gives other results than where it was made  exit code 1

Each message names the file and tensor, what was expected, what was found, and what to do.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from types import ModuleType
from typing import Any

from .telemetry import turn_off_telemetry

# Options that are limits, and what a limit can be: any other, as NaN, always holds or never does.
LIMITS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "min_cosine": ("above 0 and at most 1", lambda limit: 0 < limit <= 1),
    "max_score_difference": ("0 or more", lambda limit: 0 <= limit < math.inf),
    "max_ndcg_loss": ("from 0 to 1", lambda limit: 0 <= limit <= 1),
    "max_bytes": ("above 0", lambda limit: 0 < limit < math.inf),
    "average_bits": ("above 0", lambda limit: 0 < limit < math.inf),
}


class EmbedportError(Exception):
    """Base of all errors raised by embedport; `exit_code` is what the command line returns."""

    exit_code = 2


class InputError(EmbedportError):
    """The request is wrong: a text, an option or a path."""


class UndeclaredTaskError(InputError):
    """A checkpoint's files do not say whether it is an embedding model or a reranker."""


class CheckpointError(EmbedportError):
    """The source checkpoint is not a usable Qwen3 checkpoint."""


class ArtifactError(EmbedportError):
    """The artifact folder is damaged, incomplete, or written by a newer embedport."""


class DeviceError(EmbedportError):
    """The chosen device cannot run the artifact on this machine."""


class MissingPackageError(EmbedportError):
    """An optional package is missing."""


class VerificationError(EmbedportError):
    """An artifact just written does not load, does not run, or gives NaN or infinity.

    Or an artifact's results here differ from those where it was exported.
    """

    exit_code = 1


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


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: The module's import name.
        extra: The extra of embedport that installs it.

    Raises:
        MissingPackageError: It is not installed; names the command that installs it.
    """
    if module == "onnxruntime":
        turn_off_telemetry()
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise MissingPackageError(
            f"{module} is not installed: pip install 'embedport[{extra}]'"
        ) from error
