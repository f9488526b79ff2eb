"""JSON, read within limits of values, depth and digits: an untrusted file cannot exhaust memory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import SMALL, read_small, written

# Limits of one JSON file. Qwen3's tokenizer.json has 610,000 values.
MOST_VALUES = 4_000_000
MOST_DEPTH = 64
# Digits of one number; transformers writes 10^30, which has 31, for "no limit".
MOST_DIGITS = 100


def parse_json(text: str) -> Any:
    """Parse JSON within the limits `MOST_VALUES`, `MOST_DEPTH` and `MOST_DIGITS`.

    Raises:
        ValueError: It is not JSON, exceeds a limit, or contains a lone surrogate.
    """
    # An upper bound: every value (or its key) but the first follows a comma or an opening bracket.
    values = sum(map(text.count, ",[{"))
    if values > MOST_VALUES:
        raise ValueError(f"it should hold {MOST_VALUES:,} values at most, found about {values:,}")
    try:
        parsed = json.loads(text, parse_int=_parse_int, parse_float=_parse_float)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(parsed, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it is nested more than {MOST_DEPTH} deep") from None
    except UnicodeEncodeError as error:
        raise ValueError(
            f"it holds the lone surrogate U+{ord(error.object[error.start]):04X}"
        ) from None
    _check_depth(parsed)
    return parsed


def _parse_int(digits: str) -> int:
    return int(_check_digits(digits))


def _parse_float(digits: str) -> float:
    return float(_check_digits(digits))


def _check_digits(digits: str) -> str:
    if len(digits) > MOST_DIGITS:
        raise ValueError(
            f"a number should have {MOST_DIGITS} digits at most, found {len(digits):,}: "
            f"{digits[:20]}…"
        )
    return digits


def _check_depth(parsed: object) -> None:
    """Refuse values nested deeper than MOST_DEPTH; goes level by level, without recursion."""
    level = [[parsed]]
    for _ in range(MOST_DEPTH + 1):
        level = [
            value.values() if isinstance(value, dict) else value
            for values in level
            for value in values
            if isinstance(value, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"it is nested more than {MOST_DEPTH} deep")


def load_json(path: Path, limit: int = SMALL) -> Any:
    """Read a UTF-8 JSON file within the limits of `read_small` and `parse_json`.

    Args:
        path: The file.
        limit: Maximum bytes.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is not a regular file, not JSON, or exceeds a limit.
    """
    return parse_json(read_small(path, limit).decode("utf-8"))


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: The file.
        optional: Whether a missing file counts as an empty object.

    Raises:
        CheckpointError: The file is missing, exceeds a limit, or does not hold a JSON object.
    """
    try:
        values = load_json(path)
    except FileNotFoundError:
        if optional:
            return {}
        raise CheckpointError(f"{path} is missing: is this a checkpoint's folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(values).__name__}")
    return values


def read_optional_json(path: Path) -> dict[str, Any]:
    """Like `read_json`, but empty if there is no such file."""
    return read_json(path, optional=True)


def without_nan(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: they become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


def to_json(value: object, indent: int | None = None) -> str:
    """Format as JSON, on one line unless indented; NaN and infinity become null."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, indent=indent)
    except ValueError:
        return json.dumps(without_nan(value), ensure_ascii=False, indent=indent)


def write_jsonl(path: Path, rows: Iterable[object]) -> None:
    """Write one JSON value per line.

    Raises:
        InputError: The file cannot be written.
    """
    with written(path) as file:
        file.writelines(f"{to_json(row)}\n".encode() for row in rows)
