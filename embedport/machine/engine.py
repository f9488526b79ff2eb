"""The record of a TensorRT engine: the GPUs it runs on, and the batches it takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from ..errors import DeviceError, InputError

SHAPE = re.compile(r"(\d+)x(\d+)")
CAPABILITY = re.compile(r"(\d+)\.(\d)")
# Compute capability of the oldest devices that "ampere+" engines run on.
AMPERE = (8, 0)

# GPUs that an engine runs on besides the model it was built on: none; all of Ampere or later; those
# of the same compute capability.
Compatibility = Literal["none", "ampere+", "same-capability"]
COMPATIBILITIES: tuple[Compatibility, ...] = get_args(Compatibility)

# "tensorrt" builds on the GPU that the engine is for. "tensorrt-rtx" builds ahead of time, on any
# machine; the engine is compiled to device code where it runs.
Library = Literal["tensorrt", "tensorrt-rtx"]
LIBRARIES: dict[Library, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
# A GPU's compute capability, such as (8, 9).
Capability = tuple[int, int]


@dataclass(frozen=True)
class Profile:
    """A range of batch shapes, each (rows, tokens); the engine is tuned for `opt`.

    A batch with fewer rows or tokens than `min` is padded.
    """

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Profile:
        """Parse a profile, such as "1x1:8x128:32x512".

        Raises:
            InputError: The text is not a profile, or not in ascending order.
        """
        parts = [SHAPE.fullmatch(part) for part in text.split(":")]
        shapes = [(int(match[1]), int(match[2])) for match in parts if match]
        if len(parts) != 3 or len(shapes) != 3:
            raise InputError(
                "a profile should be MIN:OPT:MAX, each rows x tokens, like 1x1:8x128:32x512; "
                f"found {text!r}"
            )
        least, best, most = shapes
        if not all(1 <= a <= b <= c for a, b, c in zip(least, best, most, strict=True)):
            raise InputError(f"profile {text!r} should grow from MIN over OPT to MAX, from 1x1 on")
        return cls(least, best, most)

    def __str__(self) -> str:
        return ":".join(f"{rows}x{tokens}" for rows, tokens in (self.min, self.opt, self.max))

    def fits(self, rows: int, tokens: int) -> bool:
        """Whether a batch of this shape, padded to `min` if needed, is in the range."""
        return rows <= self.max[0] and tokens <= self.max[1]

    def cut(self, tokens: int) -> Profile:
        """The same profile with at most this many tokens a row."""
        least, best, most = (
            (rows, min(length, tokens)) for rows, length in (self.min, self.opt, self.max)
        )
        return Profile(least, best, most)

    def padded(self, rows: int, tokens: int) -> tuple[int, int]:
        """The shape to which a batch that fits is padded."""
        return max(rows, self.min[0]), max(tokens, self.min[1])


def choose_profile(profiles: Sequence[Profile], rows: int, tokens: int) -> int:
    """Index of the best profile for a batch: least padding, then `opt` nearest in total tokens.

    Args:
        profiles: The profiles, of which one at least fits the batch.
        rows: The batch's rows.
        tokens: Tokens of its longest row.
    """
    fitting = [i for i, profile in enumerate(profiles) if profile.fits(rows, tokens)]
    area = rows * tokens

    def cost(i: int) -> tuple[int, float]:
        opt = math.prod(profiles[i].opt)
        return math.prod(profiles[i].padded(rows, tokens)), max(opt / area, area / opt)

    return min(fitting, key=cost)


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its compute capability."""

    name: str
    capability: Capability

    def __str__(self) -> str:
        return f"{self.name} (compute capability {format_capability(self.capability)})"


def parse_capability(text: str) -> Capability:
    """Parse a compute capability, such as "8.9".

    Raises:
        InputError: The text is not one.
    """
    match = CAPABILITY.fullmatch(text)
    if match is None:
        raise InputError(f"a compute capability should be like 8.9 or 12.0; found {text!r}")
    return int(match[1]), int(match[2])


def format_capability(capability: Capability) -> str:
    """A compute capability as text, such as "8.9"."""
    return f"{capability[0]}.{capability[1]}"


@dataclass(frozen=True)
class EngineRecord:
    """An artifact's TensorRT engine.

    Attributes:
        path: Its path in the folder.
        device: The GPU that it was built on; None if it was built ahead of time.
        tensorrt: The version of the library that built it, such as "11.1.0.106".
        version_compatible: Whether later TensorRT versions with the same major number load it.
        hardware_compatible: The other GPUs that it runs on.
        profiles: The batches that it takes.
        library: The library that built it.
        capabilities: Compute capabilities of the GPUs that it runs on, if it was built ahead of
            time.
        products: Number of matrix products by the type that they are computed in, or by "a
            generated kernel" if they are a part of one, as the library says of the engine's
            layers; empty if it does not say.
    """

    path: str
    device: Device | None
    tensorrt: str
    version_compatible: bool
    hardware_compatible: Compatibility
    profiles: tuple[Profile, ...]
    library: Library = "tensorrt"
    capabilities: tuple[Capability, ...] = ()
    products: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a device that does not go with the library, with a ValueError."""
        if (self.device is None) != (self.library == "tensorrt-rtx"):
            raise ValueError(f"device {self.device} does not go with library {self.library!r}")

    @property
    def builder(self) -> str:
        """The library that built it, with its version, in words."""
        return f"{LIBRARIES[self.library]} {self.tensorrt}"

    @property
    def targets(self) -> str:
        """The GPUs that it runs on, in words."""
        if self.device is None:
            capabilities = ", ".join(map(format_capability, self.capabilities))
            return f"GPUs of compute capability {capabilities}"
        elsewhere = {
            "none": "",
            "ampere+": ", and every GPU of Ampere or later",
            "same-capability": ", and every GPU of that capability",
        }
        return f"{self.device}{elsewhere[self.hardware_compatible]}"

    def check(self, device: Device, tensorrt: str) -> None:
        """Refuse a device or a TensorRT that cannot run the engine.

        Args:
            device: The GPU.
            tensorrt: Version of the library that built the engine, as installed here.

        Raises:
            DeviceError: It cannot; names what built the engine and what is here.
        """
        again = "embedport export tensorrt ARTIFACT -o OUT"
        if not self._runs_on(device):
            raise DeviceError(
                f"the engine runs on {self.targets}; here is {device}: build one for it: {again}"
            )
        built, here = _version(self.tensorrt), _version(tensorrt)
        later = self.version_compatible and here[0] == built[0] and here >= built
        if here != built and not later:
            kind = "a version-compatible engine" if self.version_compatible else "an engine"
            raise DeviceError(
                f"{kind} was built with {self.builder}; here is {tensorrt}: build it here: {again}"
            )

    def _runs_on(self, device: Device) -> bool:
        if self.device is None:
            return device.capability in self.capabilities
        match self.hardware_compatible:
            case "ampere+":
                return device.capability >= AMPERE
            case "same-capability":
                return device.capability == self.device.capability
            case _:
                return device == self.device


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())
