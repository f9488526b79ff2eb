"""The kind of CPU this process runs on: its name, and the instruction sets that change results."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Linux's word for an instruction set to the one that is shown.
X86 = {
    name: name
    for name in (
        "sse4_2",
        "avx2",
        "fma",
        "avx_vnni",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "amx_int8",
        "amx_bf16",
    )
}
ARM = {"asimd": "neon", "asimddp": "dotprod", "i8mm": "i8mm", "bf16": "bf16", "sve": "sve"}
# A 64-bit ARM CPU has these, also where the system has no /proc/cpuinfo.
ALWAYS = {"aarch64": ("neon",), "arm64": ("neon",)}


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU.

    Attributes:
        name: Vendor's or kernel's name of the model, such as "AMD EPYC 7763 64-Core Processor".
        instructions: Instruction sets by which vector arithmetic and 8-bit products differ.
    """

    name: str
    instructions: tuple[str, ...]


def read_cpu() -> Cpu:
    """The CPU of this machine, from /proc/cpuinfo, or what Python's platform module knows.

    Under qemu's user emulation of x86 /proc/cpuinfo is the host's, and so is the result.
    """
    try:
        text = CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    name = fields.get("model name") or platform.processor() or platform.machine()
    if "CPU part" in fields:  # ARM's kernels give numbers: Cortex-A72 is part 0xd08 of 0x41
        name = f"{platform.machine()} {fields.get('CPU implementer', '?')}:{fields['CPU part']}"
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    found = [shown for flag, shown in (X86 | ARM).items() if flag in flags]
    return Cpu(name, tuple(found) or ALWAYS.get(platform.machine(), ()))
