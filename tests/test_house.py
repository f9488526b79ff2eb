"""The house: one import name, imports in one direction, a light front door."""

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from importlib.util import resolve_name
from pathlib import Path

import pytest

import embedport
from embedport.runtimes.ort_custom_ops import find_library

ROOT = Path(__file__).parent.parent
ROOMS = ("exporters", "quantize", "runtimes", "validation")
# Each place may import from the places of the same line, and from all lines above it.
TRUNK = ("embedport", "machine", "checkpoint", "texts", "artifact")
ALLOWED = {
    **{place: set(TRUNK[:row]) for row, place in enumerate(TRUNK)},
    "quantize": set(TRUNK),
    "runtimes": {*TRUNK, "quantize"},
    # The runtime computes an artifact's witness.
    "exporters": {*TRUNK, "quantize", "runtimes"},
    # Formats, for the size of the next better precision.
    "validation": {*TRUNK, "quantize", "runtimes"},
}
# exporters/ has packages of its own.
EXPORTERS = {
    "graph": set(),
    "calibration": {"graph"},
    "checkpoints": {"calibration"},
    "onnx": {"graph", "calibration"},
    "tensorrt": {"graph", "onnx"},
}
TOP = (
    "embedport/__init__.py",
    "embedport/__main__.py",
    "embedport/bench/",
    "embedport/calibration.py",
    "embedport/cli/",
    "embedport/demo/",
    "embedport/deploy/",
    "embedport/serve/",
)


def python_files():
    for place in ("embedport", *ROOMS):
        for path in sorted((ROOT / place).rglob("*.py")):
            parts = path.relative_to(ROOT).parts
            if not (place == "embedport" and len(parts) > 1 and parts[1] in ROOMS):
                yield place, path


def imported_modules(path, module):
    """Absolute names of everything a file imports, wherever in the file."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room_of(name):
    parts = name.split(".")
    if parts[0] != "embedport":
        return parts[0]
    return parts[1] if len(parts) > 1 and parts[1] in ALLOWED else "embedport"


def test_imports_point_one_way():
    checked = 0
    for place, path in python_files():
        relative = path.relative_to(ROOT)
        if str(relative).startswith(TOP):
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        module = module if place == "embedport" else f"embedport.{module}"
        place = room_of(module)
        for name in imported_modules(path, module):
            assert name.split(".")[0] not in ROOMS, f"{relative} imports {name} by its bare name"
            if name.split(".")[0] == "embedport":
                checked += 1
                room = room_of(name)
                assert room == place or room in ALLOWED[place], f"{relative} imports {name}"
    assert checked > 50


def test_exporters_import_one_way():
    checked = 0
    for place, allowed in EXPORTERS.items():
        for path in (ROOT / "exporters" / place).rglob("*.py"):
            module = f"embedport.exporters.{place}.{path.stem}".removesuffix(".__init__")
            for name in imported_modules(path, module):
                other = name.removeprefix("embedport.exporters.").partition(".")[0]
                if name.startswith("embedport.exporters.") and other in EXPORTERS:
                    checked += 1
                    assert other == place or other in allowed, f"{path} imports {name}"
    assert checked > 30


def test_public_names():
    assert sorted(embedport.__all__) == list(embedport.__all__)
    for name in embedport.__all__:
        assert getattr(embedport, name) is not None
    assert dir(embedport) == sorted(embedport.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = embedport.nothing


def test_public_functions_name_their_options():
    """Editors, type checkers and `help` see every option: its name, its type and its default."""
    checked = 0
    for name in embedport.__all__:
        value = getattr(embedport, name)
        methods = vars(value).values() if inspect.isclass(value) else [value]
        for function in filter(inspect.isfunction, methods):
            if function.__name__.startswith("_"):
                continue
            checked += 1
            for parameter in inspect.signature(function).parameters.values():
                where = f"{name}: {function.__name__}({parameter.name})"
                assert parameter.kind != parameter.VAR_KEYWORD, where
                assert parameter.name == "self" or parameter.annotation != parameter.empty, where
    assert checked > 20


def test_rooms_are_one_copy_under_one_name():
    code = (
        "import sys, embedport.exporters, embedport.quantize, embedport.runtimes, "
        f"embedport.validation; print([r for r in {ROOMS} if r in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_import_brings_nothing_heavy():
    heavy = ("numpy", "onnx", "onnx_ir", "onnxruntime", "tokenizers", "torch", "rich", "typer")
    code = f"import sys, embedport; print([m for m in {heavy!r} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_exporting_and_running_need_no_torch(tmp_path):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import embedport; from embedport.demo.pipeline import builtin_embedder\n"
        "for name in ('fp32', 'fp16', 'int8', 'int4'):\n"
        "    folder = f'{sys.argv[1]}/{name}'\n"
        "    embedport.export(builtin_embedder(), folder, precision=name, fast=name == 'int4')\n"
        "    print(embedport.load(folder, device='cpu').encode(['tea']).shape)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "(1, 256)\n" * 4


def build(tree, kind, **environment):
    """The build backend's own result for a source tree: "sdist" or "wheel"."""
    out = tree.parent / "out"
    code = f"import sys; from setuptools import build_meta as b; b.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=tree,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return max(out.iterdir(), key=lambda path: path.stat().st_mtime_ns)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The sdist of the files that git would take, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for name in files:
        target = folder / "tree" / name
        if (ROOT / name).is_file() and not (ROOT / name).is_symlink() and "tests/" not in name:
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.suffix in (".safetensors", ".reference"):
                target.touch()  # only to be compressed twice
            else:
                target.write_bytes((ROOT / name).read_bytes())
    # tarfile wants a filter from Python 3.12 on, which 3.11.2, Debian's, does not know.
    subprocess.run(["tar", "-xf", build(folder / "tree", "sdist"), "-C", folder], check=True)
    (tree,) = folder.glob("embedport-*")
    return tree


def test_wheel_holds_the_package_only(unpacked):
    wheel = build(unpacked, "wheel")
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"embedport", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
    for place, path in python_files():
        name = path.relative_to(ROOT).as_posix()
        assert (name if place == "embedport" else f"embedport/{name}") in names
    assert "embedport/demo/texts.jsonl" in names
    assert "embedport/exporters/calibration/texts.jsonl.gz" in names
    kinds = {Path(name).suffix for name in names if name.startswith("embedport/runtimes/")}
    if (library := find_library()) is None:
        assert kinds == {".py"}
        return
    # One build for every Python, and on Linux for every glibc since 2.17.
    assert kinds == {".py", library.suffix}
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    code = archive.read(f"embedport/runtimes/{library.name}")
    if sys.platform == "linux":
        needed = {tuple(map(int, found)) for found in re.findall(rb"GLIBC_(\d+)\.(\d+)", code)}
        assert (2, 0) < max(needed) <= (2, 17)


def test_wheel_without_a_compiler_is_for_any_platform(unpacked):
    wheel = build(unpacked, "wheel", CC="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith((".so", ".dll")) for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("name", [name for name in embedport.__all__ if name != "__version__"])
def test_public_names_are_their_own(name):
    """Python says a function's own name of a wrong argument, and a user knows the public one."""
    assert getattr(embedport, name).__name__ == name
