"""Only regular files are read, up to a size: a FIFO without a writer would block for ever."""

import os
import shutil
import socket
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from embedport import ModelSpec
from embedport.checkpoint.modelcard import declared_task
from embedport.checkpoint.tensor_files import open_shard
from embedport.errors import CheckpointError, InputError
from embedport.files import SMALL, read_small, written


@pytest.mark.parametrize(
    ("name", "make", "kind"),
    [
        ("config.json", os.mkfifo, "a FIFO"),
        ("tokenizer_config.json", os.mkfifo, "a FIFO"),
        ("modules.json", os.mkfifo, "a FIFO"),
        ("config.json", Path.mkdir, "a folder"),
        ("config.json", lambda path: path.symlink_to("/dev/urandom"), "a device"),
    ],
)
def test_what_is_no_file(damageable, name, make, kind):
    (damageable / name).unlink()
    make(damageable / name)
    with pytest.raises(CheckpointError, match=rf"{name}.*regular file, found {kind}"):
        ModelSpec.from_checkpoint(damageable)


def test_a_file_in_a_folders_place(damageable):
    """It is not taken for an absent one, with the default pooling."""
    shutil.rmtree(damageable / "1_Pooling")
    (damageable / "1_Pooling").write_text("")
    with pytest.raises(CheckpointError, match=r"1_Pooling/config\.json cannot be read .*Not a dir"):
        ModelSpec.from_checkpoint(damageable)


@pytest.mark.parametrize("read", [open_shard, lambda path: declared_task(path.parent)])
def test_no_right_to_read(tmp_path, monkeypatch, read):
    """The machine of these tests may be root's, who reads everything."""
    path = tmp_path / "README.md"
    path.write_text("---\n---\n")
    monkeypatch.setattr(
        "pathlib.Path.open", mock.Mock(side_effect=PermissionError(13, "not yours"))
    )
    with pytest.raises(CheckpointError, match=r"README\.md cannot be read: not yours"):
        read(path)


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
