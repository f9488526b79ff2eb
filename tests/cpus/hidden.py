"""Run a command on this x86 CPU as if it had fewer instruction sets, at its own speed.

    python tests/cpus/hidden.py avx2 make test

Software asks `cpuid` for what it may use. Linux can make that instruction fault on CPUs that have
`cpuid_fault` in /proc/cpuinfo, and a preloaded library (hide.c) then gives the answer of another
kind of CPU, to the command and to all that it starts. So the code that such a CPU runs is run here:
onnxruntime's, torch's, OpenVINO's and our own. /proc/cpuinfo is replaced for it in a mount
namespace. Speeds are those of this CPU by that code. It needs gcc or clang.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
CPUINFO = Path("/proc/cpuinfo")
EAX, EBX, ECX, EDX = range(4)


@dataclass(frozen=True)
class Feature:
    """A bit of `cpuid`, from Intel's Software Developer's Manual, volume 2A.

    Attributes:
        leaf: Value of eax.
        subleaf: Value of ecx.
        register: Where the bit is: 0 to 3 for eax, ebx, ecx, edx.
        bit: Its number.
    """

    leaf: int
    subleaf: int
    register: int
    bit: int


# By Linux's names, as in /proc/cpuinfo.
AVX = {
    "fma": Feature(1, 0, ECX, 12),
    "avx": Feature(1, 0, ECX, 28),
    "f16c": Feature(1, 0, ECX, 29),
    "avx2": Feature(7, 0, EBX, 5),
    "vaes": Feature(7, 0, ECX, 9),
    "vpclmulqdq": Feature(7, 0, ECX, 10),
}
AVX_VNNI = {
    "avx_vnni": Feature(7, 1, EAX, 4),
    "avx_ifma": Feature(7, 1, EAX, 23),
    "avx_vnni_int8": Feature(7, 1, EDX, 4),
    "avx_ne_convert": Feature(7, 1, EDX, 5),
    "avx_vnni_int16": Feature(7, 1, EDX, 10),
}
AVX512 = {
    "avx512f": Feature(7, 0, EBX, 16),
    "avx512dq": Feature(7, 0, EBX, 17),
    "avx512cd": Feature(7, 0, EBX, 28),
    "avx512bw": Feature(7, 0, EBX, 30),
    "avx512vl": Feature(7, 0, EBX, 31),
}
AVX512_VNNI = {"avx512_vnni": Feature(7, 0, ECX, 11)}
# After Skylake's server CPUs, but for VNNI.
AVX512_LATER = {
    "avx512ifma": Feature(7, 0, EBX, 21),
    "avx512vbmi": Feature(7, 0, ECX, 1),
    "avx512_vbmi2": Feature(7, 0, ECX, 6),
    "avx512_bitalg": Feature(7, 0, ECX, 12),
    "avx512_vpopcntdq": Feature(7, 0, ECX, 14),
    "avx512_vp2intersect": Feature(7, 0, EDX, 8),
    "avx512_bf16": Feature(7, 1, EAX, 5),
    "avx512_fp16": Feature(7, 0, EDX, 23),
    "avx10": Feature(7, 1, EDX, 19),
}
AMX = {
    "amx_bf16": Feature(7, 0, EDX, 22),
    "amx_tile": Feature(7, 0, EDX, 24),
    "amx_int8": Feature(7, 0, EDX, 25),
    "amx_fp16": Feature(7, 1, EAX, 21),
    "amx_complex": Feature(7, 1, EDX, 8),
}
# What each kind of CPU lacks, from new to old.
KINDS = {
    # Cascade Lake, Ice Lake: 8-bit products in VNNI
    "avx512-vnni": AVX512_LATER | AMX | AVX_VNNI,
    # Skylake's servers: 8-bit products that saturate, in 512 bits
    "avx512": AVX512_VNNI | AVX512_LATER | AMX | AVX_VNNI,
    # Alder Lake and later desktops: VNNI in 256 bits
    "avx2-vnni": AVX512 | AVX512_VNNI | AVX512_LATER | AMX,
    # Haswell to Comet Lake, Zen 1 to 3: 8-bit products that saturate, in 256 bits
    "avx2": AVX512 | AVX512_VNNI | AVX512_LATER | AMX | AVX_VNNI,
    # Nehalem to Westmere, and virtual machines without AVX
    "sse4.2": AVX512 | AVX512_VNNI | AVX512_LATER | AMX | AVX_VNNI | AVX,
}
# What a CPU of the kind has; it cannot be imitated on one that has not.
NEEDS = {
    "avx512-vnni": "avx512_vnni",
    "avx512": "avx512bw",
    "avx2-vnni": "avx_vnni",
    "avx2": "avx2",
    "sse4.2": "sse4_2",
}


class CannotHideError(Exception):
    """This machine cannot imitate the CPU; says why."""


def available_kinds() -> list[str]:
    """The kinds of CPU that this machine can imitate and is not.

    None without `cpuid_fault`, a C compiler, or the right to mount, which containers may lack.
    """
    flags = _flags()
    if "cpuid_fault" not in flags or _compiler() is None or not _may_mount():
        return []
    return [
        kind
        for kind, hidden in KINDS.items()
        if NEEDS[kind] in flags and not flags.isdisjoint(hidden)
    ]


def hiding_command(kind: str, folder: Path) -> tuple[str, ...]:
    """The words before a command that hide what a kind of CPU lacks.

    Args:
        kind: One of KINDS.
        folder: For the library and the replaced /proc/cpuinfo.

    Returns:
        What the command and its arguments are put behind.

    Raises:
        CannotHideError: This machine cannot imitate it.
        subprocess.CalledProcessError: The compiler failed.
    """
    flags, compiler, unshare = _flags(), _compiler(), shutil.which("unshare")
    if "cpuid_fault" not in flags:
        raise CannotHideError("this CPU or kernel has no cpuid_fault: see /proc/cpuinfo")
    if NEEDS[kind] not in flags:
        raise CannotHideError(f"this CPU has no {NEEDS[kind]}, so it cannot run as {kind}")
    if compiler is None:
        raise CannotHideError("no C compiler: apt-get install gcc")
    if unshare is None:
        raise CannotHideError("unshare is missing: apt-get install util-linux")
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / "hide.so"
    source = [str(HERE / "hide.c"), "-ldl"]
    subprocess.run([compiler, "-O2", "-fPIC", "-shared", "-o", str(library), *source], check=True)
    replaced = folder / f"cpuinfo-{kind}"
    text = _without(CPUINFO.read_text(encoding="utf-8"), set(KINDS[kind]))
    replaced.write_text(text, encoding="utf-8")
    rules = ",".join(
        f"{f.leaf:x}:{f.subleaf:x}:{f.register:x}:{1 << f.bit:x}" for f in KINDS[kind].values()
    )
    script = f'mount --bind "$0" {CPUINFO} && export LD_PRELOAD="$1" HIDE_CPUID="$2" || exit 2'
    script += '; shift 2; exec "$@"'
    return (unshare, *_namespace(), "sh", "-c", script, str(replaced), str(library), rules)


def _namespace() -> list[str]:
    """Options of unshare: only a namespace's root may mount, so others become root in it."""
    return ["--mount"] if os.geteuid() == 0 else ["--mount", "--map-root-user"]


def _may_mount() -> bool:
    unshare, path = shutil.which("unshare"), str(CPUINFO)
    if unshare is None:
        return False
    command = [unshare, *_namespace(), "mount", "--bind", path, path]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _without(cpuinfo: str, hidden: set[str]) -> str:
    """/proc/cpuinfo without some of its flags."""
    lines = cpuinfo.splitlines(keepends=True)
    return "".join(
        " ".join(word for word in line.rstrip("\n").split(" ") if word not in hidden) + "\n"
        if line.startswith("flags")
        else line
        for line in lines
    )


def _flags() -> set[str]:
    """Linux's names of this CPU's features; empty elsewhere."""
    try:
        lines = CPUINFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    flags = (line.split(":")[1] for line in lines if line.startswith("flags"))
    return set(next(flags, "").split())


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")


def main() -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description="Run a command as on another kind of x86 CPU.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="and its arguments")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            hiding = hiding_command(options.kind, Path(folder))
        except CannotHideError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        return subprocess.run([*hiding, *options.command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
