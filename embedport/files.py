"""A checkpoint's files, read strictly: JSON, the index of shards, and the shards' headers.

Folders may be untrusted: only regular files are read, up to a size limit, and JSON up to limits of
values, depth and digits. All other small files are read through `read_small` and `parse_json`, too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, InputError

# The file that makes a folder an artifact.
MANIFEST = "embedport.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Maximum bytes of a configuration, an index, a manifest or a shard's header (40,000 tensors).
SMALL = 4 << 20
# Limits of one JSON file. Qwen3's tokenizer.json has 610,000 values.
MOST_VALUES = 4_000_000
MOST_DEPTH = 64
# Digits of one number; transformers writes 10^30, which has 31, for "no limit".
MOST_DIGITS = 100
# Maximum bytes of a text file that is read whole.
MOST_TEXT = 8 << 30
# Maximum bytes of a file name on most file systems.
LONGEST_NAME = 255
KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: its file, name as stored, dtype in safetensors' spelling, and shape."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes.

        The first number in the dtype's name is its bits ("BF16", "F8_E4M3"); "BOOL" takes a byte.
        """
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits.group()) if bits else 8) // 8


@contextlib.contextmanager
def written(path: Path) -> Generator[IO[bytes]]:
    """Open a file for writing under a temporary name; rename it once it is complete and synced.

    Raises:
        InputError: The file cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # numpy's error for a full disk has a text but no strerror.
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_small(path: Path, limit: int = SMALL) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Args:
        path: The file; a link is followed.
        limit: Maximum bytes.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is not a regular file, or larger than `limit`.
    """
    check_regular(path)
    # O_NONBLOCK: opening would block if a FIFO has replaced the file since the check.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 (a descriptor)
        status = os.fstat(file.fileno())
        _check_kind(status)
        if status.st_size > limit:
            raise ValueError(f"it should have {limit:,} bytes at most, found {status.st_size:,}")
        # The file may have grown since fstat: read no more than the size that was checked.
        return file.read(status.st_size)


def check_regular(path: Path) -> None:
    """Refuse a FIFO, device, socket or folder: reading one may block or never end.

    Raises:
        OSError: The path is missing.
        ValueError: It is not a regular file.
    """
    _check_kind(path.stat())


def _check_kind(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise ValueError(f"it should be a regular file, found {kind}")


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


def without_nan(value: Any) -> Any:
    """Return a value for JSON, which has no NaN and no infinity: they become None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return value


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, exceeds a limit, or does not hold a JSON object.
    """
    try:
        values = load_json(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is this a checkpoint's folder?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(values).__name__}")
    return values


def is_file_name(name: object) -> bool:
    """Whether a JSON value is a plain file name: no folder part, and not too long."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not {"/", "\\", "\0"} & set(name)
        and len(name.encode()) <= LONGEST_NAME
    )


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's folder, from the headers only."""
    if not (folder / SINGLE).exists():
        if (folder / INDEX).exists():
            return set(_read_index(folder / INDEX))
        # A hub checkpoint of which only the configuration was downloaded.
        return set()
    with open_shard(folder / SINGLE) as shard:
        return set(shard.keys())


def check_links(folder: Path) -> None:
    """Refuse symbolic links that lead out of a folder, except the hub cache's links to its blobs.

    Raises:
        InputError: There is such a link, or a broken one.
    """
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    for path in sorted(folder.rglob("*")):
        if not path.is_symlink():
            continue
        _check_link(path)
        target = path.resolve()
        if not any(target.is_relative_to(base) for base in allowed):
            raise InputError(
                f"{path} is a link to {target}, outside the folder; put a copy in its place"
            )


def check_broken_links(folder: Path, patterns: Iterable[str]) -> None:
    """Refuse broken links, which would otherwise be treated like absent files.

    Args:
        folder: A checkpoint's folder.
        patterns: Glob patterns of the files to check.

    Raises:
        InputError: There is a broken link.
    """
    for pattern in patterns:
        for path in folder.glob(pattern):
            if path.is_symlink():
                _check_link(path)


def _check_link(path: Path) -> None:
    try:
        path.stat()
    except OSError as error:
        raise InputError(
            f"{path} is a link to {path.readlink()}, which leads to no file ({error.strerror}); "
            "put a copy in its place"
        ) from None


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by its stored name, sharded or in a single file.

    If a folder has both, the single file is read, as in transformers.

    Raises:
        CheckpointError: A shard is missing or damaged; or the index names a tensor that its shard
            lacks, or a file outside the folder.
    """
    if (folder / SINGLE).exists():
        return read_shard(folder / SINGLE)
    index_path = folder / INDEX
    if not index_path.exists():
        pickled = next(iter(sorted(folder.glob("*.bin"))), None)
        raise CheckpointError(
            f"{folder} has neither {SINGLE} nor {INDEX}"
            + (f"; {pickled.name} is pickled and is not read, convert it" if pickled else "")
        )
    index = _read_index(index_path)
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(index.values())):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file} is missing; {INDEX} names it")
        tensors |= read_shard(folder / file)
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{folder / file} lacks tensor {name}; {INDEX} says it is there")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map should map tensors to shards, found {index!r}")
    for name, file in index.items():
        if not is_file_name(file):
            raise CheckpointError(
                f"{path}: {name} should be in a file beside the index, found {file!r}"
            )
    return index


def read_shard(path: Path) -> dict[str, TensorInfo]:
    """Every tensor of one safetensors file by its stored name.

    Raises:
        CheckpointError: The file is missing, truncated or not safetensors.
    """
    tensors = {}
    with open_shard(path) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            view = shard.get_slice(name)
            tensors[name] = TensorInfo(name, path, view.get_dtype(), tuple(view.get_shape()))
    return tensors


def open_shard(path: Path) -> Any:
    """Memory-map a shard: a context manager with `keys()` and `get_slice(name)`.

    Raises:
        CheckpointError: The file is truncated or not safetensors, or its header is too large.
    """
    try:
        _check_header(path)
        return safe_open(path, framework="numpy")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error


def read_octets(info: TensorInfo) -> bytes:
    """The raw bytes of a tensor, for dtypes that numpy does not have.

    Raises:
        CheckpointError: The file is damaged, or has changed since its header was read.
    """
    with open_shard(info.file), info.file.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        try:
            start, end = parse_json(file.read(size).decode())[info.name]["data_offsets"]
            file.seek(8 + size + start)
            octets = file.read(end - start)
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise CheckpointError(f"{info.file}: its header is damaged: {error!r}") from error
    if len(octets) != info.nbytes:
        raise CheckpointError(
            f"{info.file}: tensor {info.name} should have {info.nbytes:,} bytes, found "
            f"{len(octets):,}"
        )
    return octets


def _check_header(path: Path) -> None:
    """Refuse a header so large that reading it takes seconds and gigabytes.

    A safetensors file begins with its header's size, 8 bytes, little-endian:
    https://huggingface.co/docs/safetensors/index#format
    """
    check_regular(path)
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if SMALL < size <= os.fstat(file.fileno()).st_size:
            raise ValueError(
                f"the header should have {SMALL:,} bytes at most, about 40,000 tensors, found "
                f"{size:,}"
            )
