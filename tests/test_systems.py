"""Other systems, imitated: Windows' files, line ends, paths and shell; macOS' names."""

import ast
import contextlib
import errno
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from setuptools.dist import Distribution
from setuptools.extension import Extension

import embedport
from embedport import integrity
from embedport.artifact.witness import Machine
from embedport.bench import machine as bench_machine
from embedport.bench.peers import serving
from embedport.errors import VerificationError
from embedport.exporters.onnx import verify
from embedport.files import is_file_name
from embedport.integrity import record_files
from embedport.links import link
from embedport.machine import cpu
from embedport.runtimes import comparison
from embedport.storage import as_place
from embedport.tables import command_words
from tests.test_house import ROOT, python_files

WITNESSES = True


def held(path):
    """Whether this process has a file mapped or open, or one in a folder of this path."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    used = {line.split(maxsplit=5)[-1] for line in maps if "/" in line}
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # that of the list itself
            used.add(str(descriptor.readlink()))
    path = os.path.realpath(path)
    return any(name == path or name.startswith(f"{path}/") for name in used)


@pytest.fixture
def windows_files(monkeypatch):
    """Files as on Windows: none that is mapped or open is moved or deleted; no folder is locked."""
    if sys.platform != "linux":
        pytest.skip("reads /proc")

    def refusing(function):
        def call(path, *others, **options):
            if any(held(each) for each in (path, *others)):
                raise PermissionError(errno.EACCES, "used by another process", str(path))
            if function is rename and os.path.lexists(others[0]):
                raise FileExistsError(errno.EEXIST, "exists already", str(others[0]))
            return function(path, *others, **options)

        return call

    rename = os.rename
    for name in ("rename", "replace", "unlink"):
        monkeypatch.setattr(os, name, refusing(getattr(os, name)))
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    import_module("filelock")  # the hub client's, which warns without fcntl
    monkeypatch.setitem(sys.modules, "fcntl", None)


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"precision": "int4", "algorithm": "gptq"}, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_export_holds_nothing_that_it_moves(windows_files, checkpoints, tmp_path, options):
    for force in (False, True):
        embedport.export(checkpoints(), tmp_path / "out", force=force, **options)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_open_is_not_moved(windows_files, tmp_path):
    """The imitation itself."""
    (tmp_path / "folder").mkdir()
    with (tmp_path / "folder" / "file").open("wb"), pytest.raises(PermissionError, match="used by"):
        (tmp_path / "folder").rename(tmp_path / "other")
    (tmp_path / "folder").rename(tmp_path / "other")


def test_a_failed_export_holds_nothing_that_it_deletes(
    windows_files, checkpoints, tmp_path, monkeypatch
):
    """When it fails, a session of the graph is open."""
    run_part = verify._run_part

    def fail(session, path, scope, values):
        if held(path.parent):
            raise VerificationError("NaN")
        return run_part(session, path, scope, values)

    monkeypatch.setattr(verify, "_run_part", fail)
    with pytest.raises(VerificationError, match="NaN"):
        embedport.export(checkpoints(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_text_is_written_as_bytes():
    """Windows writes \\r\\n for text, which bash and tokenizers do not take for \\n."""
    bytes_written = 0
    for _, path in python_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr != "write_text", f"{path}:{node.lineno}"
                bytes_written += node.attr == "write_bytes"
    assert bytes_written > 10


def test_a_change_that_no_time_shows(tmp_path, monkeypatch):
    """On Windows ctime is the time of creation, which a file copied over another keeps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(integrity, "CHANGES_SHOW", False)
    path = tmp_path / "weights"
    path.write_bytes(b"good")
    status = path.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **options: status)
    before = record_files([path])
    path.write_bytes(b"evil")
    assert record_files([path]) != before


@pytest.mark.parametrize("refused", [("symlink_to",), ("symlink_to", "hardlink_to")])
def test_no_right_to_make_links(tmp_path, monkeypatch, refused):
    for name in refused:
        error = OSError(22, "A required privilege is not held by the client")
        monkeypatch.setattr(Path, name, mock.Mock(side_effect=error))
    source = tmp_path / "source"
    (source / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "1_Pooling/config.json"):
        (source / name).write_text("{}")
    (tmp_path / "made").mkdir()
    for path in source.iterdir():
        link(tmp_path / "made" / path.name, path)
    for name in ("config.json", "1_Pooling/config.json"):
        assert (tmp_path / "made" / name).read_text() == "{}"
    shutil.rmtree(tmp_path / "made")
    assert (source / "config.json").is_file()


@pytest.mark.parametrize("name", ["C:weights.safetensors", "weights.safetensors:stream"])
def test_a_colon_is_in_no_file_name(name):
    """The first one joins a path on another drive."""
    assert not is_file_name(name)


def test_a_drive_is_no_object_store():
    assert isinstance(as_place("c://corpora/corpus.jsonl"), Path)


def test_a_command_for_windows(monkeypatch):
    words = ["embedport", "encode", r"C:\my models\qwen3"]
    assert command_words(words) == r"embedport encode 'C:\my models\qwen3'"
    monkeypatch.setattr(sys, "platform", "win32")
    assert command_words(words) == r'embedport encode "C:\my models\qwen3"'
    assert command_words([r"C:\qwen3"]) == r"C:\qwen3"


def test_no_sysconf(monkeypatch):
    monkeypatch.delattr(os, "sysconf")
    assert cpu.read_memory() == bench_machine.describe()["memory_bytes"] == 0


def test_no_resource_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert runpy.run_path(serving.__file__)["peak_bytes"]() == 0


@pytest.mark.parametrize(("machine", "name"), [("ARM64", "Apple M2"), ("AMD64", "Apple M2")])
def test_names_of_cpus(tmp_path, monkeypatch, machine, name):
    """Windows writes its machines in capitals; macOS names a CPU by a command only."""
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(cpu.platform, "machine", lambda: machine)
    monkeypatch.setattr(
        subprocess, "run", lambda *words, **options: SimpleNamespace(stdout=f"{name}\n")
    )
    assert cpu.read_cpu() == cpu.Cpu(name, ("neon",) if machine == "ARM64" else ())


def test_instruction_sets_that_are_not_known():
    """Two such CPUs are not the same one."""
    first = Machine("Intel64 Family 6 Model 85", (), None, "1.32.0", "0")
    second = replace(first, cpu="AMD64 Family 25 Model 33")
    assert comparison._computes_alike(first, first)
    assert not comparison._computes_alike(first, second)


def test_a_compilers_path_on_windows(tmp_path, monkeypatch):
    run = mock.Mock(side_effect=lambda *words, **options: (tmp_path / "t/_k.dll").touch())
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setenv("CC", r'"C:\Program Files\LLVM\bin\clang.exe" -m64')
    build = runpy.run_path(str(ROOT / "setup.py"))["BuildKernels"](Distribution())
    build.build_lib, build.build_temp, build.inplace = str(tmp_path), str(tmp_path / "t"), False
    build.build_extension(Extension("_k", ["a b.c"]))
    ((command,), _) = run.call_args
    assert command.startswith(r'"C:\Program Files\LLVM\bin\clang.exe" -m64 -shared -o ')
    assert command.endswith(' "a b.c"')
    assert (tmp_path / "_k.dll").is_file()


def test_git_converts_no_line_ends():
    """Git for Windows does by default, and data, templates and scripts would be other files."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    command = ["git", "-C", str(ROOT), "check-attr", "text", "--", "setup.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("text: unset")
