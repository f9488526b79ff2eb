"""Processes measured from outside: wall time and the peak of their whole memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Run:
    """One finished process.

    Attributes:
        seconds: Wall time from start to exit.
        peak_bytes: Largest resident set of it or a child of it (ru_maxrss), file pages counted.
        output: What it said.
    """

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str]) -> Run:
    """Run a command to its end.

    Raises:
        RuntimeError: It failed; with the end of what it said.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    os.sync()  # what an earlier process wrote must not slow down this one
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


def peer(script: str, *arguments: str) -> list[str]:
    """The command that runs a peer's script in its own environment."""
    return ["uv", "run", "--quiet", "--script", str(PEERS / script), *arguments]


def peer_versions(script: str = "optimum_onnx.py") -> dict[str, str]:
    """The packages of a peer's environment; installs it where it is not."""
    return json.loads(run(peer(script, "warm")).output.splitlines()[-1])


def ours(*arguments: str) -> list[str]:
    """The embedport command line, in this environment."""
    return [sys.executable, "-c", "from embedport.cli import main; main()", *arguments]


class Worker:
    """A process that answers a JSON line with a JSON line, so that only one works at a time."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ready = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError(f"the worker ended with {self._process.wait()}")
