"""The vectors and scores of the demo pair are the recorded ones, on whatever CPU this runs."""

import runpy
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

from embedport.runtimes.ort_custom_ops import find_library, register_kernels
from tests.vectors import compare, record

HIDDEN = runpy.run_path(str(Path(__file__).parents[1] / "cpus" / "hidden.py"))
CASES = [(task, precision) for task in record.CHECKPOINTS for precision in compare.LIMITS]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A function (task, precision) -> the artifact, loaded on the CPU, cached."""
    folder, made = tmp_path_factory.mktemp("demo"), {}

    def make(task, precision):
        if (task, precision) not in made:
            made[task, precision] = record.export_demo(task, precision, folder)
        return made[task, precision]

    return make


@pytest.mark.parametrize(("task", "precision"), CASES)
def test_vectors_are_those_recorded(demo, task, precision):
    rows = compare.read_rows(task)
    found = record.run_rows(demo(task, precision), rows)
    assert len(rows) == 17
    assert max(map(len, rows)) > 1024
    kernels = register_kernels(onnxruntime.SessionOptions()) is not None
    assert compare.apart(task, precision, found) <= compare.allowed(
        task, precision, kernels=kernels
    )


def arguments(demo):
    """Those of the script: the kernels' library if there is one, and the artifacts."""
    here = register_kernels(onnxruntime.SessionOptions())
    kernels = ["--kernels", str(find_library())] if here else []
    return [*kernels, *(str(demo(task, precision).artifact.folder) for task, precision in CASES)]


def test_the_script_needs_neither_torch_nor_the_package(demo, tmp_path):
    """As under an emulator: a plain onnxruntime."""
    code = (
        "import runpy, sys\n"
        "sys.modules.update(dict.fromkeys(('torch', 'embedport', 'safetensors', 'pytest')))\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, str(Path(compare.__file__)), *arguments(demo)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("of the limit") == len(CASES)


@pytest.mark.parametrize("kind", ["avx512", "avx2"])
def test_vectors_are_the_same_without_vnni(demo, tmp_path, kind):
    """This CPU as an older one, whose 8-bit products saturate; the artifacts are from here."""
    if kind not in HIDDEN["available_kinds"]():
        pytest.skip("this CPU cannot imitate it")
    hiding = HIDDEN["hiding_command"](kind, tmp_path)
    command = [*hiding, sys.executable, str(Path(compare.__file__)), *arguments(demo)]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.count("of the limit") == len(CASES)


def test_other_vectors_are_refused(demo):
    rows = compare.read_rows("embedding")
    found = record.run_rows(demo("embedding", "int4"), rows)
    assert compare.apart("embedding", "fp32", found) > 1
