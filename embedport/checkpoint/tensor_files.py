"""A checkpoint's safetensors files: the index, each file's header, and a tensor's raw bytes."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import MANIFEST, SMALL, check_regular, is_file_name
from ..strict_json import parse_json, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Endings of weights that torch pickles; HQQ writes qmodel.pt.
PICKLED = (".bin", ".pt", ".pth")
LFS_POINTER = b"version https://git-lfs"


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


def tensor_names(folder: Path) -> set[str]:
    """The names of all tensors in a checkpoint's folder, from the headers only.

    As in transformers, a shard's tensors count even if the index does not list them.
    """
    if not (folder / SINGLE).exists():
        if not (folder / INDEX).exists():
            # A hub checkpoint of which only the configuration was downloaded.
            return set()
        index = _read_index(folder / INDEX)
        shards = [folder / file for file in set(index.values()) if (folder / file).is_file()]
        return set(index).union(*map(read_shard, shards))
    with open_shard(folder / SINGLE) as shard:
        return set(shard.keys())


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by its stored name, sharded or in a single file.

    If a folder has both, the single file is read, as in transformers.

    Raises:
        CheckpointError: A shard is missing or damaged; the index names a tensor that its shard
            lacks, or a file outside the folder; or a tensor is there with "model." and without.
    """
    single = folder / SINGLE
    tensors = read_shard(single) if single.exists() else _read_shards(folder)
    for name, info in tensors.items():
        if (other := tensors.get(f"model.{name}")) is not None:
            raise CheckpointError(
                f"{info.file} has tensor {name}, and {other.file.name} {other.name}: one tensor "
                "under two names, of which transformers takes one or the other; take those out "
                "that do not belong to the model"
            )
    return tensors


def _read_shards(folder: Path) -> dict[str, TensorInfo]:
    index_path = folder / INDEX
    if not index_path.exists():
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}{_hint(folder)}")
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


def find_tensor(headers: Mapping[str, TensorInfo], name: str) -> TensorInfo | None:
    """A stored tensor, with "model." before its name or without."""
    return headers.get(name) or headers.get(f"model.{name}")


def dtype_and_shape(
    headers: Mapping[str, TensorInfo], name: str
) -> tuple[str | None, tuple[int, ...] | None]:
    """A stored tensor's dtype and shape; (None, None) if it is missing."""
    info = find_tensor(headers, name)
    return (None, None) if info is None else (info.dtype, info.shape)


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


def _hint(folder: Path) -> str:
    """The likely reason why a folder has no weights, for a message; "" if there is none."""
    pickled = next((file for suffix in PICKLED for file in sorted(folder.glob(f"*{suffix}"))), None)
    if pickled is not None:
        return f"; {pickled.name} is pickled and is not read, convert it"
    if (folder / MANIFEST).exists():
        return ": it is an artifact; give the checkpoint that it was made from"
    if (folder / "onnx").is_dir():
        return f", and no {MANIFEST}: an artifact is copied with all its files"
    if folder.parent.name == "snapshots":
        return ": its download into the hub's cache is unfinished; repeat it with the hub in reach"
    return ""


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
        CheckpointError: The file cannot be read, is truncated or not safetensors, or its header is
            too large.
    """
    try:
        _check_header(path)
        return safe_open(path, framework="numpy")
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        again = "download it again"
        if _is_lfs_pointer(path):
            again = "it is a pointer of Git LFS: `git lfs pull` in its clone brings the file"
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); {again}"
        ) from error


def open_holding(*tensors: TensorInfo) -> Any:
    """Memory-map the shard of some tensors as `open_shard` does, if it is still the same.

    Raises:
        CheckpointError: As for `open_shard`; or the file was replaced since its header was read,
            and now lacks a tensor, or has one of another dtype or shape.
    """
    path = tensors[0].file
    shard = open_shard(path)
    for info in tensors:
        found = None
        with contextlib.suppress(SafetensorError):
            view = shard.get_slice(info.name)
            found = view.get_dtype(), tuple(view.get_shape())
        if found != (info.dtype, info.shape):
            raise CheckpointError(
                f"{path}: tensor {info.name} was {info.dtype} of {list(info.shape)} a moment ago, "
                f"and is {'missing' if found is None else f'{found[0]} of {list(found[1])}'} now: "
                "the file was replaced meanwhile; run this again"
            )
    return shard


def _is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what a clone without Git LFS has in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def read_octets(info: TensorInfo) -> bytes:
    """The raw bytes of a tensor, for dtypes that numpy does not have.

    Raises:
        CheckpointError: As for `open_holding`.
    """
    with open_holding(info), info.file.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        # safetensors has checked the header.
        start, end = parse_json(file.read(size).decode())[info.name]["data_offsets"]
        file.seek(8 + size + start)
        return file.read(end - start)


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
