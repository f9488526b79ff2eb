"""This CPU with some of its instruction sets hidden: what runs takes it for an older one."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
HIDDEN = runpy.run_path(str(HERE / "hidden.py"))
# What a program of this CPU sees: /proc/cpuinfo, numpy's and onnxruntime's `cpuid`.
SEEN = """
import faulthandler, json
faulthandler.enable()  # takes SIGSEGV, which the hiding needs too
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features
from embedport.machine.cpu import read_cpu
from embedport.runtimes.exact import saturates
seen = {
    "linux": read_cpu().instructions,
    "numpy": [name for name, has in numpy_features.items() if has],
    "saturates": saturates(),
}
print(json.dumps(seen))
"""
FLAGS = "flags\t\t: fpu avx2 avx_vnni avx512f avx512_vnni sha\n"


@pytest.fixture(scope="module")
def can_hide():
    """Skip where the CPU, the kernel or the rights of a container do not allow it."""
    kinds = HIDDEN["available_kinds"]()
    if not kinds:
        pytest.skip("cpuid does not fault here, nothing compiles C, or mounts are not allowed")
    return kinds


@pytest.mark.parametrize(
    ("kind", "linux", "numpy", "saturates"),
    [
        ("avx512", {"avx2", "avx512f"}, {"AVX2", "AVX512_SKX"}, True),
        ("avx2-vnni", {"avx2", "avx_vnni"}, {"AVX2"}, False),
        ("avx2", {"avx2"}, {"AVX2"}, True),
        ("sse4.2", set(), set(), False),
    ],
)
def test_a_program_sees_an_older_cpu(can_hide, kind, linux, numpy, saturates):
    if kind not in can_hide:
        pytest.skip("the CPU is of this kind, or older")
    command = [sys.executable, str(HERE / "hidden.py"), kind, sys.executable, "-c", SEEN]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    names = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"}
    assert names.intersection(seen["linux"]) == linux
    assert {"AVX2", "AVX512_SKX", "AVX512_CLX"}.intersection(seen["numpy"]) == numpy
    assert seen["saturates"] is saturates


def test_a_crash_is_still_one(can_hide, tmp_path):
    hiding = HIDDEN["hiding_command"](can_hide[-1], tmp_path)
    crash = "import ctypes, faulthandler; faulthandler.enable(); ctypes.string_at(1)"
    done = subprocess.run(
        [*hiding, sys.executable, "-c", crash], capture_output=True, text=True, check=False
    )
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr


@pytest.mark.parametrize(
    ("kind", "message"),
    [("avx512", "has no avx512bw, so it cannot run as avx512"), ("avx2", "no C compiler")],
)
def test_what_cannot_be_hidden_is_named(monkeypatch, tmp_path, kind, message):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags\t\t: cpuid_fault avx2 avx_vnni\n", encoding="utf-8")
    scope = HIDDEN["hiding_command"].__globals__
    monkeypatch.setitem(scope, "CPUINFO", cpuinfo)
    monkeypatch.setitem(scope, "_compiler", lambda: None)
    with pytest.raises(HIDDEN["CannotHideError"], match=message):
        HIDDEN["hiding_command"](kind, tmp_path)
    assert HIDDEN["available_kinds"]() == []


def test_flags_are_taken_out_whole():
    lines = HIDDEN["_without"](FLAGS + "bugs\t\t: avx2\n", {"avx2", "avx512f"})
    assert lines == "flags\t\t: fpu avx_vnni avx512_vnni sha\nbugs\t\t: avx2\n"
