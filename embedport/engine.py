"""What is known of a TensorRT engine: where it runs, and which batches it takes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .errors import DeviceError, InputError

SHAPE = re.compile(r"(\d+)x(\d+)")
# Compute capability of the oldest devices that "ampere+" engines run on.
AMPERE = (8, 0)

# Where else an engine runs than on the kind of GPU that it was built on: nowhere; on every one of
# Ampere or later; on those of the same compute capability.
Compatibility = Literal["none", "ampere+", "same-capability"]
COMPATIBILITIES: tuple[Compatibility, ...] = get_args(Compatibility)


@dataclass(frozen=True)
class Profile:
    """A range of batches, each (rows, tokens); the engine is tuned for `opt`.

    A batch of fewer tokens than `min` is padded, one of fewer rows too.
    """

    min: tuple[int, int]
    opt: tuple[int, int]
    max: tuple[int, int]

    @classmethod
    def parse(cls, text: str) -> Profile:
        """A profile of its text, "1x1:8x128:32x512".

        Raises:
            InputError: It is none, or not in order.
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
        """Whether a batch of that shape, padded to `min` if need be, is in the range."""
        return rows <= self.max[0] and tokens <= self.max[1]

    def padded(self, rows: int, tokens: int) -> tuple[int, int]:
        """The shape in which a batch that fits is run."""
        return max(rows, self.min[0]), max(tokens, self.min[1])


def choose_profile(profiles: Sequence[Profile], rows: int, tokens: int) -> int:
    """The number of the profile for a batch: least padding, then the tuned shape nearest in tokens.

    Raises:
        InputError: The batch is too large for all of them.
    """
    taken = [i for i, each in enumerate(profiles) if each.fits(rows, tokens)]
    if not taken:
        raise InputError(
            f"a batch of {rows} x {tokens} tokens is beyond the engine's profiles "
            f"({', '.join(map(str, profiles))}); build it with a larger --profile, or give a "
            "smaller batch_tokens or max_length"
        )
    area = rows * tokens

    def cost(i: int) -> tuple[int, float]:
        opt = math.prod(profiles[i].opt)
        return math.prod(profiles[i].padded(rows, tokens)), max(opt / area, area / opt)

    return min(taken, key=cost)


@dataclass(frozen=True)
class Device:
    """A GPU: its name and its compute capability."""

    name: str
    capability: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.capability[0]}.{self.capability[1]})"


@dataclass(frozen=True)
class EngineRecord:
    """What is known of an artifact's engine.

    Attributes:
        path: Its path in the folder.
        device: The GPU that it was built on.
        tensorrt: The version that built it, "11.1.0.106".
        version_compatible: Whether later versions of the same major one load it too.
        hardware_compatible: Where else it runs.
        profiles: The batches that it takes.
    """

    path: str
    device: Device
    tensorrt: str
    version_compatible: bool
    hardware_compatible: Compatibility
    profiles: tuple[Profile, ...]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> EngineRecord:
        """From what a manifest holds.

        Raises:
            TypeError, KeyError, ValueError: It is damaged.
        """
        device = Device(values["device"]["name"], _pair(values["device"]["capability"]))
        profiles = tuple(
            Profile(_pair(each["min"]), _pair(each["opt"]), _pair(each["max"]))
            for each in values["profiles"]
        )
        if values["hardware_compatible"] not in COMPATIBILITIES:
            raise ValueError(f"hardware_compatible is {values['hardware_compatible']!r}")
        facts: dict[str, Any] = {**values, "device": device, "profiles": profiles}
        return cls(**facts)

    def check(self, device: Device, tensorrt: str) -> None:
        """Refuse a device or a TensorRT that cannot run the engine.

        Raises:
            DeviceError: With what it was built with and what is here.
        """
        again = "build it here: embedport export tensorrt ARTIFACT -o OUT"
        if not self._runs_on(device):
            raise DeviceError(
                f"the engine was built on {self.device} and is hardware-compatible with "
                f"{self.hardware_compatible!r}; here is {device}: {again}"
            )
        built, here = _version(self.tensorrt), _version(tensorrt)
        later = self.version_compatible and here[0] == built[0] and here >= built
        if here != built and not later:
            kind = "a version-compatible engine" if self.version_compatible else "an engine"
            raise DeviceError(
                f"{kind} was built with TensorRT {self.tensorrt}; here is {tensorrt}: {again}"
            )

    def _runs_on(self, device: Device) -> bool:
        match self.hardware_compatible:
            case "ampere+":
                return device.capability >= AMPERE
            case "same-capability":
                return device.capability == self.device.capability
            case _:
                return device == self.device


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".") if part.isdigit())


def _pair(values: Sequence[int]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)
