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
from types import ModuleType

from .telemetry import turn_off_telemetry


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
