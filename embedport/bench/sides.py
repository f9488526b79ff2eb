"""The sides of a race: a process each, which answers requests about rows of token ids."""

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
from ..runtimes.facts import ModelFacts
from .threads import thread_variables

SCRIPTS = Path(__file__).parent / "peers"
# Of what a process that failed said last.
SHOWN_CHARACTERS = 2000


@dataclass(frozen=True)
class Peer:
    """Another tool.

    Attributes:
        name: Under which it is asked for and shown.
        script: In peers/, with its own environment.
        kind: What the script does, of the kinds that it knows.
        bits: Of the arithmetic that most of its time goes into.
        source: The peer whose folder it is made from; None for the checkpoint.
        prepared: Whether it needs a folder of its own; otherwise it reads its source.
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
        Peer("llama.cpp-q8_0", "llama_cpp_.py", "q8_0", 8),
        Peer("llama.cpp-q4_k_m", "llama_cpp_.py", "q4_k_m", 8),
        Peer("openvino-bf16", "openvino_ir.py", "bf16", 16, "optimum-fp32"),
        Peer("sentence-transformers-bf16", "sentence_transformers_.py", "bf16", 16, prepared=False),
        Peer("sentence-transformers-onnx", "sentence_transformers_.py", "onnx", 32),
        Peer("optimum-fp32", "optimum_onnx.py", "fp32", 32),
    )
}


@dataclass(frozen=True)
class Side:
    """One that takes part.

    Attributes:
        name: In the table.
        command: Serves requests.
        folder: What it serves.
        bits: Of its arithmetic.
        versions: Of the packages that it runs on.
        has_batches: Whether it makes its own batches of what it is given.
    """

    name: str
    command: tuple[str, ...]
    folder: Path
    bits: int
    versions: dict[str, str]
    has_batches: bool = False

    @property
    def size(self) -> int:
        """Bytes of its folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Installed:
    """The environment of a script in peers/.

    Attributes:
        command: Runs the script there.
        versions: Of the packages that it runs on.
    """

    command: tuple[str, ...]
    versions: dict[str, str]


def our_side(facts: ModelFacts, threads: int) -> Side:
    """An artifact or a checkpoint, as `embedport.load` runs it on a CPU."""
    folder = facts.folder
    if facts.checkpoint is not None and facts.checkpoint.source.adapter is not None:
        folder = facts.checkpoint.source.adapter.folder  # which names its base
    command = (sys.executable, "-m", "embedport.bench.serve", str(folder))
    command += (str(threads), facts.task)
    bits = 8 if facts.precision.startswith(("int8", "int4", "mixed")) else 32
    return Side(f"embedport {facts.precision}", command, facts.folder, bits, {}, has_batches=True)


def peer_side(
    peer: Peer,
    installed: Mapping[str, Installed],
    checkpoint: Path,
    cache: Path,
    threads: int,
    say: Callable[[str], None],
) -> Side:
    """Make what a peer serves, unless it is there.

    Args:
        peer: Which.
        installed: Its script's environment, and that of the peer it is made from.
        checkpoint: What it is to serve.
        cache: Where what it needs is kept.
        threads: What it is to work with.
        say: Told what takes long.

    Raises:
        VerificationError: The peer fails.
    """
    command, versions = installed[peer.script].command, installed[peer.script].versions
    folder = checkpoint
    if peer.source is not None:
        source = PEERS[peer.source]
        folder = peer_side(source, installed, checkpoint, cache, threads, say).folder
    if peer.prepared:
        origin = folder
        folder = cache / f"{peer.name}-{_key(peer.script, origin, versions)}"
        if not folder.is_dir():
            say(f"{peer.name}: preparing")
            cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=cache) as temporary:
                made = Path(temporary) / "made"
                made.mkdir()
                _run([*command, "prepare", peer.kind, str(origin), str(made)])
                made.replace(folder)
    serve = (*command, "serve", peer.kind, str(folder), str(threads))
    return Side(peer.name, serve, folder, peer.bits, versions)


def with_sources(peers: Iterable[Peer]) -> list[Peer]:
    """Peers, and before each the one that it is made from, none twice."""
    found: dict[str, Peer] = {}
    for peer in peers:
        sources = [PEERS[peer.source]] if peer.source is not None else []
        found |= {each.name: each for each in (*sources, peer)}
    return list(found.values())


def install_peer(script: str) -> Installed:
    """Make the environment of a script in peers/; uv is there.

    Raises:
        VerificationError: The environment cannot be made.
    """
    path = str(SCRIPTS / script)
    warm = json.loads(_run(["uv", "run", "--quiet", "--script", path, "warm"]))
    return Installed((warm["python"], path), warm["versions"])


def _key(script: str, source: Path, versions: dict[str, str]) -> str:
    """Changes with all that the peer's folder is made from."""
    hashed = hashlib.sha256((SCRIPTS / script).read_bytes() + json.dumps(versions).encode())
    for path in (source, *sorted(source.glob("*"))):
        status = path.stat()
        hashed.update(f"{path.resolve()} {status.st_size} {status.st_mtime_ns}\n".encode())
    return hashed.hexdigest()[:12]


def _run(command: list[str]) -> str:
    """The last line that a command prints."""
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise VerificationError(
            f"{' '.join(command[-5:])} ended with {done.returncode}:\n"
            f"{done.stderr[-SHOWN_CHARACTERS:]}"
        )
    return (done.stdout.strip().splitlines() or [""])[-1]


def _environment() -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return os.environ | fixed | thread_variables()


class Worker:
    """A side's process: a line of JSON in, a line of JSON out, so that only one works at a time.

    Attributes:
        ready: What it said when it had loaded: the threads that its library reports.
    """

    def __init__(self, command: tuple[str, ...]) -> None:
        self._command = command
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=_environment(),
            text=True,
        )
        self.ready = self._answer()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            VerificationError: The process ended.
        """
        assert self._process.stdin is not None
        # Its end is reported when the answer is read.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        said = self._errors.read()[-SHOWN_CHARACTERS:]
        self.close()
        raise VerificationError(f"{' '.join(self._command[-3:])} ended with {code}:\n{said}")
