"""Only regular files are read, up to a size: a FIFO without a writer would block for ever."""

import hashlib
import os
import shutil
import socket
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from embedport import ModelSpec, integrity
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


def test_a_full_disk_in_numpys_words(tmp_path):
    """numpy's error of a short write has neither number nor reason."""
    with (
        pytest.raises(InputError, match=r"100 requested and 7 written .is the disk full"),
        written(tmp_path / "a.npy"),
    ):
        raise OSError("100 requested and 7 written")
    assert not list(tmp_path.iterdir())


def test_two_writers_of_one_file(tmp_path):
    """Threads, or processes of two containers with one number: none writes into the other's."""
    path = tmp_path / "x"
    with written(path) as outer:
        outer.write(b"outer, " * 3)
        with written(path) as inner:
            inner.write(b"inner")
        assert path.read_bytes() == b"inner"
    assert path.read_bytes() == b"outer, " * 3
    assert [*tmp_path.iterdir()] == [path]


def test_a_hash_is_of_the_file_that_is_opened(tmp_path, monkeypatch):
    """Not of one that replaces it meanwhile: the cache would keep that under the first's inode."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "x"
    path.write_bytes(b"first")
    place = integrity.cache_folder

    def replacing(name):
        folder.rename(tmp_path / "kept")
        folder.mkdir()
        path.write_bytes(b"other")
        return place(name)

    with monkeypatch.context() as patch:
        patch.setattr(integrity, "cache_folder", replacing)
        integrity.record_files([path])
    (record,) = integrity.record_files([tmp_path / "kept" / "x"]).values()
    assert record.sha256 == hashlib.sha256(b"first").hexdigest()


def test_a_copy_that_keeps_the_time_of_change(tmp_path):
    """It may have a deleted file's inode as well, and is another file."""
    path = tmp_path / "x"
    path.write_bytes(b"first")
    states, before = integrity.read_states([path]), path.stat()
    while path.stat().st_ctime_ns == before.st_ctime_ns:
        path.write_bytes(b"other")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="x was changed or replaced while"):
        integrity.check_unchanged(states, InputError)
