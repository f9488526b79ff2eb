"""Only regular files are read, up to a size: a FIFO without a writer would block for ever."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from embedport import ModelSpec
from embedport.errors import CheckpointError, InputError
from embedport.files import SMALL, read_small, written


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json"])
def test_fifo(damageable, name):
    (damageable / name).unlink()
    os.mkfifo(damageable / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*regular file, found a FIFO"):
        ModelSpec.from_checkpoint(damageable)


def test_device(damageable):
    (damageable / "config.json").unlink()
    (damageable / "config.json").symlink_to("/dev/urandom")
    with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a device"):
        ModelSpec.from_checkpoint(damageable)


def test_folder(damageable):
    (damageable / "config.json").unlink()
    (damageable / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a folder"):
        ModelSpec.from_checkpoint(damageable)


def test_socket():
    with tempfile.TemporaryDirectory() as base, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{base}/s")  # a path of 107 bytes at most
        with pytest.raises(ValueError, match="found a socket"):
            read_small(Path(base) / "s")


def test_large_file(damageable):
    with (damageable / "config.json").open("r+b") as file:
        file.truncate(4 << 30)  # takes no room
    with pytest.raises(CheckpointError, match=rf"{SMALL:,} bytes at most, found 4,294,967,296"):
        ModelSpec.from_checkpoint(damageable)


def test_a_place_where_nothing_can_be_removed(tmp_path):
    """As on a read-only file system: what says so is the error of writing."""
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(InputError, match="x cannot be written: Not a directory"),
        written(tmp_path / "file" / "x") as file,
    ):
        file.write(b"")
