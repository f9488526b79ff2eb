"""Only regular files are read, up to a size: a FIFO without a writer would block for ever."""

import os
import socket
import tempfile
from pathlib import Path

import pytest

from embedport import ModelSpec
from embedport.errors import CheckpointError
from embedport.files import SMALL, read_small


@pytest.fixture
def folder(checkpoints, copied):
    return copied(checkpoints())


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json"])
def test_fifo(folder, name):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*regular file, found a FIFO"):
        ModelSpec.from_checkpoint(folder)


def test_device(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/urandom")
    with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a device"):
        ModelSpec.from_checkpoint(folder)


def test_folder(folder):
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a folder"):
        ModelSpec.from_checkpoint(folder)


def test_socket():
    with tempfile.TemporaryDirectory() as base, socket.socket(socket.AF_UNIX) as made:
        made.bind(f"{base}/s")  # a path of 107 bytes at most
        with pytest.raises(ValueError, match="found a socket"):
            read_small(Path(base) / "s")


def test_large_file(folder):
    with (folder / "config.json").open("r+b") as file:
        file.truncate(4 << 30)  # takes no room
    with pytest.raises(CheckpointError, match=rf"{SMALL:,} bytes at most, found 4,294,967,296"):
        ModelSpec.from_checkpoint(folder)
