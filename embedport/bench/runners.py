"""The runners of a benchmark: each is a process that answers requests with rows of token ids."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import VerificationError
from ..runtimes.info import ModelInfo
from .threads import thread_variables

SCRIPTS = Path(__file__).parent / "peers"
# Characters shown of a failed process's standard error.
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Peer:
    """Another tool to compare with.

    Attributes:
        name: Its name for --peer and in tables.
        script: Its script in peers/, which declares its own environment.
        kind: The variant that the script runs, such as "int8".
        bits: Width of the arithmetic in which it spends most of its time.
        source: The peer whose folder it converts; None for the checkpoint.
        prepared: Whether it converts its source into a folder of its own, or reads it directly.
    """

    name: str
    script: str
    kind: str
    bits: int
    source: str | None = None
    prepared: bool = True


PEERS = {
    peer.name: peer
    for peer in (
        Peer("optimum-int8", "optimum_onnx.py", "int8", 8, "optimum-fp32"),
        Peer("openvino-int8", "openvino_ir.py", "int8", 8, "optimum-fp32"),
        Peer("onnxruntime-genai-int4", "onnxruntime_genai_.py", "int4", 8),
        Peer("llama.cpp-q8_0", "llama_cpp_.py", "q8_0", 8),
        Peer("llama.cpp-q4_k_m", "llama_cpp_.py", "q4_k_m", 8),
        Peer("openvino-bf16", "openvino_ir.py", "bf16", 16, "optimum-fp32"),
        Peer("sentence-transformers-bf16", "sentence_transformers_.py", "bf16", 16, prepared=False),
        Peer("sentence-transformers-onnx", "sentence_transformers_.py", "onnx", 32),
        Peer("optimum-fp32", "optimum_onnx.py", "fp32", 32),
    )
}


@dataclass(frozen=True)
class Runner:
    """A participant in a benchmark.

    Attributes:
        name: Its name in tables.
        command: The command that serves requests.
        folder: The folder that it serves.
        bits: Width of its arithmetic.
        versions: Versions of the packages that it runs on.
        has_batches: Whether it forms batches by itself.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    bits: int
    versions: dict[str, str]
    has_batches: bool = False

    @property
    def size(self) -> int:
        """Size of its folder in bytes."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Installed:
    """The environment of a script in peers/.

    Attributes:
        command: The command that runs the script in it.
        versions: Versions of the packages that the script runs on.
    """

    command: tuple[str, ...]
    versions: dict[str, str]


def our_runner(info: ModelInfo, threads: int) -> Runner:
    """An artifact or a checkpoint, as `embedport.load` runs it on a CPU."""
    folder = info.folder
    if info.checkpoint is not None and info.checkpoint.source.adapter is not None:
        folder = info.checkpoint.source.adapter.folder  # its config names the base
    # -P: a clone in the current folder is not what is installed.
    command = (sys.executable, "-P", "-m", "embedport.bench.serve", str(folder))
    command += (str(threads), info.task)
    bits = 8 if info.precision.startswith(("int8", "int4", "mixed")) else 32
    return Runner(f"embedport {info.precision}", command, info.folder, bits, {}, has_batches=True)


def peer_runner(
    peer: Peer,
    installed: Mapping[str, Installed],
    checkpoint: Path,
    cache: Path,
    threads: int,
    say: Callable[[str], None],
) -> Runner:
    """Prepare a peer's folder, unless the cache has it, and make it a runner.

    Args:
        peer: The peer.
        installed: The environments of its script and of its source's script.
        checkpoint: The checkpoint to serve.
        cache: Folder for prepared models.
        threads: Number of threads to use.
        say: Called with a description of each long step.

    Raises:
        VerificationError: The peer fails.
    """
    command, versions = installed[peer.script].command, installed[peer.script].versions
    folder = checkpoint
    if peer.source is not None:
        source = PEERS[peer.source]
        folder = peer_runner(source, installed, checkpoint, cache, threads, say).folder
    if peer.prepared:
        origin = folder
        folder = cache / f"{peer.name}-{_key(peer.script, origin, versions)}"
        if not folder.is_dir():
            say(f"{peer.name}: preparing")
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                output = Path(temporary) / "made"
                output.mkdir()
                _run([*command, "prepare", peer.kind, str(origin), str(output)])
                output.replace(folder)
    serve = (*command, "serve", peer.kind, str(folder), str(threads))
    return Runner(peer.name, serve, folder, peer.bits, versions)


def with_sources(peers: Iterable[Peer]) -> list[Peer]:
    """The peers, each after its source, without duplicates."""
    by_name: dict[str, Peer] = {}
    for peer in peers:
        sources = [PEERS[peer.source]] if peer.source is not None else []
        by_name |= {member.name: member for member in (*sources, peer)}
    return list(by_name.values())


def install_peer(script: str) -> Installed:
    """Create the environment of a script in peers/ with uv.

    Raises:
        VerificationError: The environment cannot be created.
    """
    path = str(SCRIPTS / script)
    warm = json.loads(_run(["uv", "run", "--quiet", "--script", path, "warm"]))
    return Installed((warm["python"], path), warm["versions"])


def _key(script: str, source: Path, versions: dict[str, str]) -> str:
    """A hash of everything that a peer's folder is made from."""
    hashed = hashlib.sha256((SCRIPTS / script).read_bytes() + json.dumps(versions).encode())
    for path in (source, *sorted(source.glob("*"))):
        status = path.stat()
        hashed.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()[:12]


def _run(command: list[str]) -> str:
    """Run a command and return the last line of its output."""
    finished = subprocess.run(
        command,
        env=_environment(),
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if finished.returncode:
        raise VerificationError(
            f"{' '.join(command[-5:])} ended with {finished.returncode}:\n"
            f"{finished.stderr[-SHOWN_CHARACTERS:]}"
        )
    return (finished.stdout.strip().splitlines() or [""])[-1]


def _environment() -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | fixed | thread_variables()


class Worker:
    """A runner's process: takes one line of JSON, answers one line; they work in turn.

    Attributes:
        ready: Its message after loading: the number of threads that its library reports.
    """

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            encoding="utf-8",
            errors="replace",
        )
        self.ready = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            VerificationError: The process ended.
        """
        assert self._process.stdin is not None
        # If the process has ended, `_answer` reports it. Windows knows no broken pipe.
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(OSError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        output = self._errors.read()[-SHOWN_CHARACTERS:]
        self.close()
        raise VerificationError(f"{' '.join(self._command[-3:])} ended with {code}:\n{output}")
