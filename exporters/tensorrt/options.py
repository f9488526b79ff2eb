"""The options of building an engine from a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from ...errors import InputError
from ...machine.engine import COMPATIBILITIES, Capability, Compatibility, Library, Profile

# For which GPUs an engine is built: those of RTX, ahead of time; or the one of this machine.
Target = Literal["rtx", "this-gpu"]
TARGETS: tuple[Target, ...] = get_args(Target)
BUILDERS: dict[Target, Library] = {"rtx": "tensorrt-rtx", "this-gpu": "tensorrt"}


@dataclass(frozen=True)
class EngineOptions:
    """How an engine is built.

    Attributes:
        profiles: The batches to tune for, at least one.
        version_compatible: Whether later TensorRT versions of the same major version load it.
        hardware_compatible: Where it runs besides the kind of GPU that it is built on.
        target: "rtx" or "this-gpu"; None for either, as the other options and the machine allow.
        capabilities: Compute capabilities to build for ahead of time; empty for all that the
            library supports.
    """

    profiles: tuple[Profile, ...]
    version_compatible: bool = False
    hardware_compatible: Compatibility = "none"
    target: Target | None = None
    capabilities: tuple[Capability, ...] = ()

    def __post_init__(self) -> None:
        if not self.profiles:
            raise InputError("an engine needs at least one profile: give `profiles`")
        if self.hardware_compatible not in COMPATIBILITIES:
            raise InputError(
                f"hardware_compatible should be one of {', '.join(COMPATIBILITIES)}, found "
                f"{self.hardware_compatible!r}"
            )
        if self.target not in (None, *TARGETS):
            raise InputError(f"for should be one of {', '.join(TARGETS)}, found {self.target!r}")
        if not self.libraries:
            raise InputError(
                "`compute_capability` is for engines that TensorRT for RTX builds ahead of time "
                "(`target` rtx), `version_compatible` and `hardware_compatible` for those that "
                "TensorRT builds on their GPU (`target` this-gpu)"
            )

    @property
    def libraries(self) -> tuple[Library, ...]:
        """The libraries that can build it, the preferred one first."""
        compatible = self.version_compatible or self.hardware_compatible != "none"
        impossible = {"rtx": compatible, "this-gpu": bool(self.capabilities)}
        wanted = (self.target,) if self.target else ("this-gpu", "rtx")
        return tuple(BUILDERS[target] for target in wanted if not impossible[target])
