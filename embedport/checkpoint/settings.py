"""A JSON file's values, read strictly: an error names the file, the key and what was found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .keys import shown


@dataclass(frozen=True)
class Settings:
    """The values of a JSON file.

    Attributes:
        path: The file, for errors.
        values: Its values.
    """

    path: Path
    values: Mapping[str, Any]

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A value of one type; numbers are positive.

        Args:
            key: The key.
            kind: bool, int or float.
            default: The value if the key is absent.

        Raises:
            CheckpointError: The value is null, absent without a default, or of another type.
        """
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if kind is float and type(value) is int:  # JSON's 1 is 1.0
            value = float(value)
        if type(value) is not kind:
            raise CheckpointError(
                f"{self.path}: {key} should be {kind.__name__}, found {shown(value)}"
            )
        if kind in (int, float) and not 0 < value < math.inf:
            raise CheckpointError(f"{self.path}: {key} should be positive, found {value!r}")
        return value

    def refuse(self, key: str, *accepted: object) -> None:
        """Refuse a value that is neither absent, null nor one of `accepted`.

        Raises:
            CheckpointError: It is another one.
        """
        value = self.values.get(key)
        if value is None or value in accepted:
            return
        expected = " or ".join(map(repr, accepted)) or "absent"
        raise CheckpointError(
            f"{self.path}: {key} is {shown(value)}, and only {expected} is supported"
        )
