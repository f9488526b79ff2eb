"""Run processes and measure their wall time and peak memory."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Run:
    """One finished process.

    Attributes:
        seconds: Wall time from start to exit.
        peak_bytes: Largest resident set of the process or a child (ru_maxrss), with file pages.
        output: Its standard output and standard error.
    """

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: The command failed; the message has the end of its output.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    os.sync()  # pending writes of earlier processes would slow this one down
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read().decode(errors="replace")
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(f"{command}: {output[-3000:]}")
    return Run(seconds, usage.ru_maxrss * 1024, output)


def script(path: Path, *arguments: str) -> list[str]:
    """The command that runs a script in its own environment."""
    return ["uv", "run", "--quiet", "--script", str(path), *arguments]


def ours(*arguments: str) -> list[str]:
    """The embedport command line, in this environment."""
    return [sys.executable, "-c", "from embedport.cli import main; main()", *arguments]


def export_ours(source: Path, folder: Path, precision: str) -> Path:
    """Export into the folder, under the precision's name; 4 bits are not calibrated."""
    out = folder / precision
    fast = ["--fast"] if precision == "int4" else []
    run(ours("export", "onnx", str(source), "-o", str(out), "--precision", precision, *fast))
    return out
