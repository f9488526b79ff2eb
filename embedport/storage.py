"""Where texts are read and vectors are written: local files, or an object store through pyarrow.

A URI such as `s3://bucket/corpus.jsonl` or `gs://bucket/vectors` is an `ObjectPath`. An object
appears in its store when it is complete, or not at all, so a killed job leaves no half-written one.
Credentials, regions and endpoints are found as pyarrow finds them: from the environment
(AWS_ENDPOINT_URL, …), the store's own configuration files, or the URI's query.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Generator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

from .errors import InputError, require
from .files import check_regular, written

# A scheme has two letters or more: one is a drive of Windows.
URI = re.compile(r"[a-z][a-z0-9+]+://.+")
BUFFER = 1 << 20


@dataclass(frozen=True)
class ObjectPath:
    """A file or folder in an object store: what corpora need of pathlib.Path.

    Attributes:
        root: The URI as the user gave it.
        inner: The rest of the path, below `root`.
    """

    root: str
    inner: str = ""

    def __str__(self) -> str:
        base = self.root.partition("?")[0].rstrip("/")
        return f"{base}/{self.inner}" if self.inner else base

    def __truediv__(self, name: str) -> ObjectPath:
        return ObjectPath(self.root, f"{self.inner}/{name}" if self.inner else name)

    @property
    def name(self) -> str:
        """The last part."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last part's suffix, with its dot."""
        return Path(self.name).suffix

    def absolute(self) -> ObjectPath:
        """Itself."""
        return self

    def mkdir(self, **_options: object) -> None:
        """Nothing: object stores have no folders."""

    def exists(self) -> bool:
        """Whether there is an object of this name."""
        filesystem, path = self._locate()
        return bool(filesystem.get_file_info(path).is_file)

    def sizes(self) -> dict[str, int]:
        """Name to bytes of the objects in this folder."""
        from pyarrow.fs import FileSelector

        filesystem, path = self._locate()
        entries = filesystem.get_file_info(FileSelector(path, allow_not_found=True))
        return {entry.base_name: entry.size for entry in entries if entry.is_file}

    def unlink(self) -> None:
        """Delete it."""
        filesystem, path = self._locate()
        filesystem.delete_file(path)

    def open_to_read(self) -> IO[bytes]:
        """Open it to read, with seek."""
        filesystem, path = self._locate()
        return io.BufferedReader(filesystem.open_input_file(path), BUFFER)

    def write_bytes(self, data: bytes | memoryview) -> None:
        """Write it whole."""
        filesystem, path = self._locate()
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    def _locate(self) -> tuple[Any, str]:
        filesystem, path = _open_filesystem(self.root)
        return filesystem, f"{path.rstrip('/')}/{self.inner}" if self.inner else path


Place = Path | ObjectPath


@cache
def _open_filesystem(uri: str) -> tuple[Any, str]:
    """The filesystem of a URI, and the path in it."""
    require("pyarrow", "arrow")
    from pyarrow.fs import FileSystem

    options = ""
    if uri.startswith("s3://"):  # an object takes one request; a multipart upload takes three
        options = ("&" if "?" in uri else "?") + "allow_delayed_open=true"
    try:
        return FileSystem.from_uri(uri + options)
    except (ValueError, OSError) as error:
        raise InputError(f"{uri.partition('?')[0]} cannot be opened: {error}") from error


def as_place(text: str) -> Place:
    """A local path, or an object store's for a URI."""
    if not URI.fullmatch(text):
        return Path(text)
    place = ObjectPath(text)
    _open_filesystem(text)  # what is wrong with the URI is said before any work
    return place


def open_to_read(place: Place) -> IO[bytes]:
    """Open a file to read, with seek.

    Raises:
        OSError: It is missing or cannot be read.
        ValueError: It is not a regular file.
    """
    if isinstance(place, ObjectPath):
        return place.open_to_read()
    check_regular(place)
    return place.open("rb")


@contextlib.contextmanager
def writing(place: Place) -> Generator[IO[bytes]]:
    """Open a file to write; it gets its name when it is complete.

    Raises:
        InputError: It cannot be written.
    """
    if isinstance(place, Path):
        with written(place) as file:
            yield file
        return
    buffer = io.BytesIO()
    yield buffer
    try:
        place.write_bytes(buffer.getbuffer())
    except OSError as error:
        raise InputError(f"{place} cannot be written: {error}") from error
