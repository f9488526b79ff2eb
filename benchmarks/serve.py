"""`embedport serve` under load: no answer lost or crossed, memory over time, latency, and a peer.

The peer is infinity-emb, in an environment of its own, with the same checkpoint and requests:

    uv venv infinity && uv pip install -p infinity 'infinity-emb[server,torch]'
    python -m benchmarks serve --infinity infinity/bin/infinity_emb
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .bulk import flatness, resident_bytes
from .checkpoint import scratch
from .machine import RESULTS, print_table, save
from .process import ours

CLIENTS, REQUESTS = 200, 20_000
# Clients and requests of the comparison with the peer.
FEW, COMPARED = 32, 4_000
INTERVAL = 0.25  # seconds between memory samples
START_SECONDS = 180
# Largest difference of a value in any batch, by precision: see docs/runtimes.md.
TOLERANCE = {"fp32": 1e-6, "int8": 1e-5}
INFINITY_TOLERANCE = 1e-4
SHOWN = ("requests_per_second", "cpu_ms_per_request", "p50_ms", "p99_ms", "worst_difference")


@dataclass
class Load:
    """Latencies, answers and errors, as the clients saw them.

    Attributes:
        seconds: Each request's time.
        memory: (seconds since the start, resident bytes) of the server.
        wall: Time of all.
        cpu: The server's CPU time, which other work on the machine does not change.
        worst: Largest difference of a value to the right vector.
    """

    seconds: list[float] = field(default_factory=list)
    memory: list[tuple[float, int]] = field(default_factory=list)
    wall: float = 0.0
    cpu: float = 0.0
    worst: float = 0.0

    def figures(self) -> dict[str, Any]:
        """Requests per second, median and 99th percentile in milliseconds."""
        p50, p99 = np.percentile(self.seconds, [50, 99]) * 1000
        return {
            "requests": len(self.seconds),
            "requests_per_second": round(len(self.seconds) / self.wall, 1),
            "cpu_ms_per_request": round(self.cpu / len(self.seconds) * 1000, 2),
            "p50_ms": round(float(p50), 1),
            "p99_ms": round(float(p99), 1),
            "worst_difference": self.worst,
        }


def measure_serve(
    results: Path = RESULTS,
    *,
    precision: str = "fp32",
    infinity: Path | None = None,
    rounds: int = 3,
) -> None:
    """Load the server with 200 clients and 20,000 requests, and compare it with infinity-emb.

    Args:
        results: Folder of the results.
        precision: The demo embedder's precision.
        infinity: The command infinity_emb of another environment; None for no comparison.
        rounds: Interleaved rounds of the comparison.

    Raises:
        RuntimeError: An answer is missing, or is another text's.
    """
    import embedport
    from embedport.demo.pipeline import builtin_embedder
    from embedport.texts.beir import read_beir

    texts = list(read_beir("builtin").documents.values())
    with scratch() as temporary:
        folder = temporary / "embedder"
        embedport.export(builtin_embedder(), folder, precision=precision)
        embedder = embedport.load_embedder(folder, device="cpu")
        expected = embedder.encode(texts)
        # The texts have 20 tokens on average; more tokens an hour say little without it.
        lengths = [len(ids) for ids in embedder.tokenizer.encode(texts).ids]
        tolerance = TOLERANCE[precision]
        with _serving(ours("serve", str(folder)), "/health") as (port, pid):
            load = asyncio.run(
                _load(port, pid, "/v1/embeddings", texts, expected, CLIENTS, REQUESTS, tolerance)
            )
        figures: dict[str, Any] = {
            "precision": precision,
            "clients": CLIENTS,
            "tokens_per_text": round(float(np.mean(lengths)), 1),
            **load.figures(),
            **flatness(load.memory),
            "memory": load.memory,
        }
        if infinity is not None:
            figures["comparison"] = _compare(folder, infinity, texts, expected, tolerance, rounds)
    print_table(
        ["server", "clients", "requests/s", "CPU ms/request", "p50 ms", "p99 ms", "difference"],
        [
            [name, row["clients"]] + [row[key] for key in SHOWN]
            for name, row in [
                ("embedport", figures),
                *((row["server"], row) for row in figures.get("comparison", [])),
            ]
        ],
    )
    print(
        f"memory: {figures['bytes_at_a_quarter'] / 1e6:.1f} MB at a quarter, "
        f"{figures['bytes_at_the_end'] / 1e6:.1f} MB at the end"
    )
    save(f"serve-demo-{precision}", figures, results)


def _compare(
    folder: Path,
    infinity: Path,
    texts: Sequence[str],
    expected: np.ndarray,
    tolerance: float,
    rounds: int,
) -> list[dict[str, Any]]:
    """Rounds of both servers in turn, each with the machine to itself."""
    from embedport.demo.pipeline import builtin_embedder

    peer = [
        *(str(infinity), "v2", "--model-id", str(builtin_embedder()), "--engine", "torch"),
        *("--device", "cpu", "--dtype", "float32", "--no-bettertransformer"),
    ]
    sides = (
        ("embedport", ours("serve", str(folder)), "/v1/embeddings", tolerance),
        ("infinity-emb", peer, "/embeddings", INFINITY_TOLERANCE),
    )
    rows = []
    for turn in range(rounds):
        for name, command, path, limit in sides:
            with _serving(command, "/health") as (port, pid):
                for requests in (COMPARED // 10, COMPARED):  # the first warms it up
                    load = asyncio.run(
                        _load(port, pid, path, texts, expected, FEW, requests, limit)
                    )
            rows.append({"server": name, "round": turn, "clients": FEW, **load.figures()})
    return rows


@contextlib.contextmanager
def _serving(command: list[str], health: str) -> Generator[tuple[int, int]]:
    """Run a server: its port and process id, once it is ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)], stdout=log, stderr=log, env=environment
        )
        try:
            deadline = time.monotonic() + START_SECONDS
            while not _is_ready(port, health):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{command}: {log.read().decode(errors='replace')[-3000:]}")
                time.sleep(0.2)
            yield port, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def _is_ready(port: int, health: str) -> bool:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", health)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


async def _load(
    port: int,
    pid: int,
    path: str,
    texts: Sequence[str],
    expected: np.ndarray,
    clients: int,
    requests: int,
    tolerance: float,
) -> Load:
    """Send requests of one text each, from clients that wait for each answer.

    Raises:
        RuntimeError: An answer is not 200, or is not the text's vector.
    """
    load, start, cpu = Load(), time.perf_counter(), cpu_seconds(pid)
    numbers = iter(range(requests))
    watching = asyncio.create_task(_watch(pid, load.memory, start))

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in numbers:
            i = number % len(texts)
            sent = time.perf_counter()
            writer.write(_request(path, texts[i]))
            status, content = await _answer(reader)
            load.seconds.append(time.perf_counter() - sent)
            if status != 200:
                raise RuntimeError(f"{status}: {content[:500]!r}")
            (entry,) = json.loads(content)["data"]
            vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
            worst = float(np.abs(vector - expected[i]).max())
            load.worst = max(load.worst, worst)
            if not worst <= tolerance:
                raise RuntimeError(f"text {i}: another text's vector, {worst} away")
        writer.close()

    try:
        await asyncio.gather(*(client() for _ in range(clients)))
        load.wall, load.cpu = time.perf_counter() - start, cpu_seconds(pid) - cpu
    finally:
        watching.cancel()
    if len(load.seconds) != requests:
        raise RuntimeError(f"{requests:,} requests, {len(load.seconds):,} answers")
    return load


def cpu_seconds(pid: int) -> float:
    """A process's CPU time, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _watch(pid: int, memory: list[tuple[float, int]], start: float) -> None:
    while True:
        if (resident := resident_bytes(pid)) is not None:
            memory.append((round(time.perf_counter() - start, 2), resident))
        await asyncio.sleep(INTERVAL)


def _request(path: str, text: str) -> bytes:
    body = json.dumps({"input": [text], "model": "embedder", "encoding_format": "base64"}).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    ).encode() + body


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    status, *headers = head.decode("latin-1").splitlines()
    size = next(
        int(line.partition(":")[2]) for line in headers if line.lower()[:15] == "content-length:"
    )
    return int(status.split()[1]), await reader.readexactly(size)
