"""A checkpoint's files, read strictly: JSON, the index of shards, and the shards' headers."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open

from .errors import CheckpointError, InputError

# An artifact's.
MANIFEST = "embedport.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor is and what it holds; `name` as stored, `dtype` in safetensors' spelling."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values; every dtype's name ends with its bits, as "BF16" and "F8_E4M3" do.

        "BOOL" has none, and takes a byte.
        """
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits.group()) if bits else 8) // 8


@contextlib.contextmanager
def written(path: Path) -> Generator[IO[bytes]]:
    """A file that takes its name only when it is complete and on the disk.

    Raises:
        InputError: It cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        # numpy says in words that the disk is full.
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: The file is missing, not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: is this a checkpoint's folder?") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} should hold a JSON object, found {type(values).__name__}")
    return values


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's folder, from the headers only."""
    if not (folder / SINGLE).exists():
        if (folder / INDEX).exists():
            return set(_read_index(folder / INDEX))
        # Only the configuration of a hub checkpoint was fetched.
        return set()
    with open_shard(folder / SINGLE) as shard:
        return set(shard.keys())


def check_links(folder: Path) -> None:
    """Refuse symbolic links out of a folder; those of the hub's cache lead to its own blobs.

    Raises:
        InputError: There is one.
    """
    allowed = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        allowed.append(folder.resolve().parents[1] / "blobs")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and not any(path.resolve().is_relative_to(base) for base in allowed):
            raise InputError(
                f"{path} is a link to {path.resolve()}, outside the folder; put a copy in its place"
            )


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by its stored name, sharded or in a single file.

    Where both are there, transformers reads the single file, and so is it here.

    Raises:
        CheckpointError: A shard is missing or damaged, the index names a tensor that its shard
            lacks, or a file outside the folder.
    """
    if (folder / SINGLE).exists():
        return _read_shard(folder / SINGLE)
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
        tensors |= _read_shard(folder / file)
    for name, file in index.items():
        if name not in tensors or tensors[name].file.name != file:
            raise CheckpointError(f"{folder / file} lacks tensor {name}; {INDEX} says it is there")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    index = read_json(path).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise CheckpointError(f"{path}: weight_map should map tensors to shards, found {index!r}")
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(
                f"{path}: {name} should be in a file beside the index, found {file!r}"
            )
    return index


def _read_shard(path: Path) -> dict[str, TensorInfo]:
    tensors = {}
    with open_shard(path) as shard:
        for name in shard.keys():  # noqa: SIM118 (not a dict)
            view = shard.get_slice(name)
            tensors[name] = TensorInfo(name, path, view.get_dtype(), tuple(view.get_shape()))
    return tensors


def open_shard(path: Path) -> Any:
    """Map a shard: a context manager with `keys()` and `get_slice(name)`.

    Raises:
        CheckpointError: The file is truncated or not safetensors.
    """
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); download it again"
        ) from error
