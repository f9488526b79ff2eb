"""The CPU that this process runs on: its name, and the instruction sets that affect results."""

from __future__ import annotations

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Instruction sets by Linux's names; those of ARM have other names in messages.
X86 = (
    *("sse4_2", "avx2", "fma", "avx_vnni"),
    *("avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
)
ARM = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}
# Every 64-bit ARM CPU has these; used on systems without /proc/cpuinfo.
ALWAYS = {"aarch64": ("neon",), "arm64": ("neon",)}


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU.

    Attributes:
        name: The model's name from the vendor or kernel, such as "AMD EPYC 7763 64-Core Processor".
        instructions: Instruction sets that affect vector arithmetic and 8-bit products.
    """

    name: str
    instructions: tuple[str, ...]


def read_cpu() -> Cpu:
    """The CPU of this machine, from /proc/cpuinfo or else Python's platform module.

    Under qemu's user-mode emulation of x86, /proc/cpuinfo describes the host, and so does the
    result.
    """
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or _brand() or platform.processor() or platform.machine()
    if "CPU part" in fields:  # on ARM, Linux gives numbers: Cortex-A72 is part 0xd08 of 0x41
        name = f"{platform.machine()} {fields.get('CPU implementer', '?')}:{fields['CPU part']}"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    instructions = [flag for flag in X86 if flag in flags]
    instructions += [shown for flag, shown in ARM.items() if flag in flags]
    return Cpu(name, tuple(instructions) or ALWAYS.get(platform.machine().lower(), ()))


def _brand() -> str:
    """The CPU's name on macOS, such as "Apple M2", where Python says "arm"; "" elsewhere."""
    if sys.platform == "darwin":
        command = ("/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string")
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=5)
            return done.stdout.strip()
    return ""


def read_memory() -> int:
    """Bytes of RAM; 0 if the system does not tell Python, as on Windows."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0
