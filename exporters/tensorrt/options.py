"""The options of building an engine from a graph."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError
from ...machine.engine import COMPATIBILITIES, Compatibility, Profile


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        profiles: The batches to tune for, at least one.
        version_compatible: Whether later TensorRT versions of the same major version load it.
        hardware_compatible: Where it runs besides the kind of GPU that it is built on.
    """

    profiles: tuple[Profile, ...]
    version_compatible: bool
    hardware_compatible: Compatibility

    def __post_init__(self) -> None:
        if not self.profiles:
            raise InputError("an engine needs at least one --profile")
        if self.hardware_compatible not in COMPATIBILITIES:
            raise InputError(
                f"hardware_compatible should be one of {', '.join(COMPATIBILITIES)}, found "
                f"{self.hardware_compatible!r}"
            )
