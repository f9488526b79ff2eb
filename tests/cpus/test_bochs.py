"""An emulated machine's input and output; no machine boots here."""

import importlib
import json
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SCRIPT = """
import colorsys, ctypes, pathlib, sys, textwrap
print(pathlib.Path(sys.argv[1], "data").read_text())
ctypes.CDLL(sys.argv[1] + "/../link/library.so")
{end}
"""


@pytest.fixture
def bochs(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE))
    return importlib.import_module("bochs")


@pytest.fixture
def prepared(bochs, tmp_path):
    """The machine's root, and the files that it gets beside, of a script that reads one."""
    given = tmp_path / "given"
    given.mkdir()
    (given / "data").write_text("some", encoding="utf-8")
    (tmp_path / "link").symlink_to(given)
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    (given / "library.so").symlink_to(next(line.split()[-1] for line in maps if "libc.so" in line))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end="raise SystemExit('no')"), encoding="utf-8")
    own = tmp_path / "own"
    return own, bochs.prepare(own, script, [str(given)])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_machine_has_what_a_script_loads(prepared, tmp_path):
    own, files = prepared
    modules = {file.name for file in files if file.suffix == ".py"}
    assert {"script.py", "colorsys.py", "textwrap.py"} <= modules
    # A file is asked for by the same name there, though a link leads to it.
    assert {tmp_path / "given" / "data", tmp_path / "link" / "library.so"} <= files
    names = {file.name for file in files}
    assert any(name.startswith("ld-linux") for name in names)
    assert "libc.so.6" in names
    assert not any(own in file.parents or file.parts[1] == "proc" for file in files)
    settings = json.loads((own / "settings.json").read_text(encoding="utf-8"))
    assert settings["arguments"] == [str(tmp_path / "script.py"), str(tmp_path / "given")]
    # Python compiles nothing again: it looks for each module's code below `cache`.
    assert list(own.glob("cache/**/colorsys.*.pyc"))


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ('{"name": "a"}\r\nexit code 0\r\n[ 2.58] reboot: Power down\r\n', 0),
        ("Traceback\r\nexit code 1\r\n", 1),
        ("signal 11\r\n", 1),
        ("exit code no\r\n", 1),
    ],
)
def test_the_serial_port_says_how_a_script_ended(bochs, monkeypatch, tmp_path, said, code):
    monkeypatch.setattr(bochs, "prepare", lambda *_: set())
    monkeypatch.setattr(bochs, "write_cd", lambda *_: None)
    monkeypatch.setattr(bochs, "LIMIT", ("sh", "-c", f"printf '{said}' > serial; exit 1"))
    done = bochs.BochsMachine("icelake", tmp_path / "kernel", tmp_path).run(Path("script.py"))
    assert done.returncode == code
    assert done.stdout.splitlines() == said.split("\r\n")[:-1]
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_does_not_start_is_a_failure(bochs, monkeypatch, tmp_path):
    monkeypatch.setattr(bochs, "prepare", lambda *_: set())
    monkeypatch.setattr(bochs, "write_cd", lambda *_: None)
    monkeypatch.setattr(bochs, "LIMIT", ("sh", "-c", "echo 'no display' >&2; exit 1"))
    done = bochs.BochsMachine("icelake", tmp_path / "kernel", tmp_path).run(Path("script.py"))
    assert (done.returncode, done.stderr) == (1, "no display\n")


def test_missing_packages_are_named(bochs, monkeypatch, tmp_path):
    needed = {str(tmp_path / name): name for name in ("xorriso", "cpio")}
    monkeypatch.setattr(bochs, "NEEDED", needed | {sys.executable: "python3"})
    with pytest.raises(bochs.MissingToolError, match="apt-get install cpio xorriso"):
        bochs.bochs_machine("icelake", tmp_path)
