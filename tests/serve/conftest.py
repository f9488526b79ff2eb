"""Servers on loopback, in a thread of the test's process."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest

import embedport
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.serve import create_app
from embedport.serve.models import ServedEmbedder, served

uvicorn = pytest.importorskip("uvicorn")


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    content: bytes

    @property
    def json(self):
        return json.loads(self.content)


@dataclass
class Client:
    port: int

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def send(self, method, path, body=None, **headers):
        connection = self.connect()
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, content, headers)
        response = connection.getresponse()
        answer = Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            response.read(),
        )
        connection.close()
        return answer

    def post(self, path, body, **headers):
        return self.send("POST", path, body, **headers)

    def get(self, path, **headers):
        return self.send("GET", path, **headers)

    def metric(self, name):
        """The sum of a metric over its labels."""
        lines = self.get("/metrics").content.decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith((f"{name} ", f"{name}{{"))
        )

    def wait(self, condition):
        for _ in range(500):
            if condition():
                return
            time.sleep(0.01)
        raise AssertionError("waited in vain")


@contextmanager
def running(load, *, ready=True, grace=None, **options):
    app = create_app(load, **options)
    config = {"port": 0, "http": "h11", "log_config": None, "lifespan": "on"}
    server = uvicorn.Server(uvicorn.Config(app, timeout_graceful_shutdown=grace, **config))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.005)
        client = Client(server.servers[0].sockets[0].getsockname()[1])
        if ready:
            client.wait(lambda: client.get("/health").status == 200)
        yield client
    finally:
        server.should_exit = True
        thread.join()


class GatedEmbedder(ServedEmbedder):
    """An embedder whose batches wait for the gate, and fail or give NaN on words of the text."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.gate = threading.Event()
        self.gate.set()
        self.batches = []
        self.failing, self.undefined = (self._last_ids(word) for word in ("fail", "undefined"))

    def block(self, client, pool):
        """Send a text that the model does not give back before the gate opens."""
        self.gate.clear()
        self.batches.clear()
        answer = pool.submit(client.post, "/v1/embeddings", {"input": "blocks the model"})
        client.wait(lambda: self.batches)
        return answer

    def _last_ids(self, word):
        return self.embedder.tokenizer.encode([word]).ids[0].tolist()

    def run(self, rows, keys, lane):
        self.batches.append(len(rows))
        self.gate.wait(10)
        if any(row.tolist() == self.failing for row in rows):
            raise RuntimeError("a batch that does not run")
        results = super().run(rows, keys, lane)
        for row, result in zip(rows, results, strict=True):
            if row.tolist() == self.undefined:
                result[:] = np.nan
        return results


@pytest.fixture(scope="session")
def runners(tmp_path_factory):
    """Task to a loaded model."""
    base = tmp_path_factory.mktemp("serve")
    checkpoints = {"embedding": builtin_embedder(), "reranker": builtin_reranker()}
    return {
        task: embedport.load(
            embedport.export(checkpoint, base / task).folder, device="cpu", max_length=256
        )
        for task, checkpoint in checkpoints.items()
    }


@pytest.fixture(scope="session")
def models(runners):
    """A server's models by name, both kinds."""
    return {task: served(task, runner, None) for task, runner in runners.items()}


@pytest.fixture(scope="module")
def client(models):
    """A client of a server of both models."""
    with running(lambda: models) as client:
        yield client


@pytest.fixture
def gated(runners):
    return GatedEmbedder("embedding", runners["embedding"], None)
