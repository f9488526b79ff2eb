"""Files of the user's cache folder: whole, or not there."""

import subprocess
import sys

import pytest

from embedport.cached import read_cached, write_cached


def test_round_trip(tmp_path):
    path = tmp_path / "a" / "file"
    assert read_cached(path) is None
    for content in (b"", b"some", memoryview(b"others")):
        write_cached(path, content)
        assert read_cached(path) == bytes(content)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: data[:10], lambda data: b""]
)
def test_damaged(tmp_path, damage):
    path = tmp_path / "file"
    write_cached(path, b"kernels")
    path.write_bytes(damage(path.read_bytes()))
    assert read_cached(path) is None


def test_no_room(tmp_path):
    """A cache that cannot be written is no error: here a file stands in the folder's place."""
    (tmp_path / "folder").write_bytes(b"")
    write_cached(tmp_path / "folder" / "file", b"kernels")
    assert read_cached(tmp_path / "folder" / "file") is None


def test_killed_or_failed_writers_leave_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_cached(path, b"old")
    monkeypatch.setattr(
        "pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    write_cached(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
    assert read_cached(path) == b"old"


WRITER = """
import sys
from pathlib import Path
from embedport.cached import write_cached
for _ in range(100):
    write_cached(Path(sys.argv[1]), bytes([int(sys.argv[2])]) * 100_000)
"""


def test_two_writers_and_a_reader(tmp_path):
    path = tmp_path / "file"
    write_cached(path, b"\1" * 100_000)
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, str(byte)]) for byte in (1, 2)]
    while any(writer.poll() is None for writer in writers):
        content = read_cached(path)
        assert content is not None
        assert len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [path]
