"""The server: each answer is the runtime's own, and what cannot be answered is said."""

import base64
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from embedport import query_prompt
from embedport.errors import DeviceError, InputError
from embedport.serve import Limits, serve
from embedport.serve.answers import as_refusal

from .conftest import Client, running, uvicorn

TEXTS = ["What is the capital of China?", "Explain gravity", "日本語 🥾", "a " * 60]
EMBEDDINGS, RERANK = "/v1/embeddings", "/v1/rerank"


def vectors(answer):
    assert answer.status == 200, answer.content
    data = answer.json["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], np.float32)


class TestEmbeddings:
    def test_as_encode(self, client, runners):
        embedder = runners["embedding"]
        answer = client.post(EMBEDDINGS, {"input": TEXTS, "model": "embedding"})
        np.testing.assert_allclose(vectors(answer), embedder.encode(TEXTS), atol=1e-6)
        tokens = sum(len(ids) for ids in embedder.tokenizer.encode(TEXTS).ids)
        assert answer.json["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert answer.json["model"] == "embedding"

    @pytest.mark.parametrize(
        ("fields", "prompt"),
        [
            ({"input_type": "query"}, "query"),
            ({"input_type": "search_document"}, "document"),
            ({"task": "retrieval.query"}, "query"),
            ({"prompt_name": "query"}, "query"),
            ({"instruction": "Find the statute"}, query_prompt("Find the statute")),
        ],
    )
    def test_prompts(self, client, runners, fields, prompt):
        found = vectors(client.post(EMBEDDINGS, {"input": "noise at night", **fields}))
        expected = runners["embedding"].encode(["noise at night"], prompt=prompt)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_base64_and_dimensions(self, client, runners):
        body = {"input": TEXTS, "dimensions": 16, "encoding_format": "base64"}
        data = client.post(EMBEDDINGS, body).json["data"]
        found = [np.frombuffer(base64.b64decode(entry["embedding"]), "<f4") for entry in data]
        expected = runners["embedding"].encode(TEXTS, dim=16)
        np.testing.assert_allclose(found, expected, atol=1e-6)

    def test_text_too_long(self, client, runners):
        long = "word " * 500
        answer = client.post(EMBEDDINGS, {"input": ["short", long]})
        assert answer.status == 422
        assert "text 1 has more than the" in answer.json["error"]["message"]
        for truncate in (True, "END"):
            found = vectors(client.post(EMBEDDINGS, {"input": long, "truncate": truncate}))
            np.testing.assert_allclose(found, runners["embedding"].encode([long]), atol=1e-6)

    def test_requests_share_batches_and_none_is_crossed(self, gated, runners):
        texts = [f"text number {i} " + "and more " * (i % 7) for i in range(60)]
        expected = runners["embedding"].encode(texts)
        with running(lambda: {"embedding": gated}) as client, ThreadPoolExecutor(20) as pool:
            gated.block(client, pool)
            answers = [pool.submit(client.post, EMBEDDINGS, {"input": text}) for text in texts]
            client.wait(lambda: client.metric("embedport_queued_texts") == 19)
            gated.gate.set()
            found = np.concatenate([vectors(answer.result()) for answer in answers])
        np.testing.assert_allclose(found, expected, atol=1e-6)
        assert sum(gated.batches) == 61
        assert max(gated.batches) > 4

    def test_a_query_does_not_wait_for_a_large_request(self, gated, models, monkeypatch):
        """Nor does one of another model."""
        reranker, before = models["reranker"], []
        run = reranker.run

        def score(*arguments):
            before.append(len(gated.batches))
            return run(*arguments)

        pair = {"query": "tea", "documents": ["a leaf"]}
        with (
            running(lambda: models | {"embedding": gated}) as client,
            ThreadPoolExecutor() as pool,
            monkeypatch.context() as patch,
        ):
            patch.setattr(reranker, "run", score)
            gated.block(client, pool)
            bulk = {"input": [f"text number {i}" for i in range(2000)]}
            slow = pool.submit(client.post, EMBEDDINGS, bulk)
            client.wait(lambda: client.metric("embedport_queued_texts") == 2000)
            quick = [
                pool.submit(client.post, *request)
                for request in ((EMBEDDINGS, {"input": "a query"}), (RERANK, pair))
            ]
            client.wait(lambda: client.metric("embedport_queued_texts") == 2002)
            gated.gate.set()
            assert [answer.result().status for answer in quick] == [200, 200]
            assert not slow.done()
            assert len(vectors(slow.result())) == 2000
        assert before[0] < len(gated.batches)


DOCUMENTS = ["tea is a leaf", "Paris", "a boat with sails", "a " * 40]


class TestRerank:
    @pytest.mark.parametrize("path", [RERANK, "/v2/rerank", "/rerank"])
    def test_as_rank(self, client, runners, path):
        ranked = runners["reranker"].rank("tea", DOCUMENTS, instruction="Find it", top_k=3)
        body = {"query": "tea", "documents": DOCUMENTS, "top_n": 3, "instruction": "Find it"}
        body |= {"model": "reranker", "return_documents": True}
        answer = client.post(path, body)
        assert answer.status == 200, answer.content
        results = answer.json["results"]
        assert [result["index"] for result in results] == [one.index for one in ranked]
        assert [result["document"]["text"] for result in results] == [o.document for o in ranked]
        scores = [result["relevance_score"] for result in results]
        np.testing.assert_allclose(scores, [one.score for one in ranked], atol=1e-6)
        pairs = [("tea", document) for document in DOCUMENTS]
        encoded = runners["reranker"].tokenizer.encode(pairs, "Find it")
        assert answer.json["usage"]["total_tokens"] == sum(map(len, encoded.ids))

    def test_documents_as_objects(self, client):
        plain = client.post(RERANK, {"query": "tea", "documents": ["a", "b"]}).json["results"]
        objects = [{"text": "a"}, {"text": "b"}]
        found = client.post(RERANK, {"query": "tea", "documents": objects}).json["results"]
        assert found == plain
        assert "document" not in found[0]

    def test_as_tei(self, client, runners):
        ranked = runners["reranker"].rank("tea", DOCUMENTS)
        body = {"query": "tea", "texts": DOCUMENTS, "return_text": True, "raw_scores": False}
        answer = client.post("/rerank", body).json
        assert [(one["index"], one["text"]) for one in answer] == [
            (one.index, one.document) for one in ranked
        ]
        np.testing.assert_allclose(
            [o["score"] for o in answer], [o.score for o in ranked], atol=1e-6
        )


class TestRefusals:
    @pytest.mark.parametrize(
        ("path", "body", "status", "message"),
        [
            (EMBEDDINGS, b"{", 400, "should be JSON"),
            (EMBEDDINGS, b"[]", 400, "should be a JSON object, found a list"),
            (EMBEDDINGS, b'{"input": "\\ud800"}', 400, "should be JSON"),
            (EMBEDDINGS, b'{"input": "\xff"}', 400, "should be JSON"),
            (EMBEDDINGS, b'{"input": NaN}', 400, "should be JSON"),
            (EMBEDDINGS, b"[" * 100_000, 400, "should be JSON"),
            (EMBEDDINGS, {}, 400, "input is missing"),
            (EMBEDDINGS, {"input": []}, 400, "at least one text"),
            (EMBEDDINGS, {"input": [1, 2]}, 400, "check_embedding_ctx_length=False"),
            (EMBEDDINGS, {"input": [[1, 2]]}, 400, "check_embedding_ctx_length=False"),
            (EMBEDDINGS, {"input": ["a", 1]}, 400, "input[1] should be a string, found a number"),
            (EMBEDDINGS, {"input": [True]}, 400, "input[0] should be a string, found a truth"),
            (EMBEDDINGS, {"input": ["a"] * 2049}, 422, "2,048 texts at most, found 2,049"),
            (EMBEDDINGS, {"input": "a" * 1_000_001}, 422, "1,000,000 characters at most"),
            (EMBEDDINGS, {"input": "a", "model": "b"}, 404, "served are: embedding"),
            (EMBEDDINGS, {"input": "a", "model": "reranker"}, 404, "'reranker' is no embedder"),
            (RERANK, {"query": "a", "documents": ["a"], "model": "embedding"}, 404, "no reranker"),
            (EMBEDDINGS, {"input": "a", "model": 1}, 400, "model should be a string"),
            (EMBEDDINGS, {"input": "a", "dimensions": 257}, 400, "from 1 to 256, found 257"),
            (EMBEDDINGS, {"input": "a", "dimensions": 0}, 400, "a number from 1 on"),
            (EMBEDDINGS, {"input": "a", "dimensions": True}, 400, "a number from 1 on"),
            (EMBEDDINGS, {"input": "a", "encoding_format": "int8"}, 400, '"float" or "base64"'),
            (EMBEDDINGS, {"input": "a", "input_type": "image"}, 400, "input_type should be one of"),
            (EMBEDDINGS, {"input": "a", "prompt_name": "queri"}, 400, "no prompt is named"),
            # As a literal prompt it would stand before the text.
            (EMBEDDINGS, {"input": "a", "prompt_name": "retrieval.query"}, 400, "document, query"),
            (
                EMBEDDINGS,
                {"input": "a", "task": "query", "input_type": "query"},
                400,
                "give one of",
            ),
            (EMBEDDINGS, {"input": "a", "truncate": "START"}, 400, "truncate should be"),
            (EMBEDDINGS, {"input": "a", "truncate": 1}, 400, "truncate should be"),
            (EMBEDDINGS, {"input": "a", "colour": "red"}, 400, "unknown field 'colour'"),
            (RERANK, {"documents": ["a"]}, 400, "query is missing"),
            (RERANK, {"query": "a", "documents": [{"title": "b"}]}, 400, "found null"),
            (RERANK, {"query": "a", "documents": "b"}, 400, "a list of strings"),
            (RERANK, {"query": "a", "documents": ["b"], "top_n": 0}, 400, "from 1 on"),
            (RERANK, {"query": "a " * 900, "documents": ["b"]}, 422, "pair 0 has more than"),
            # Before each of 2,000 texts these would be 18 MB for the tokenizer.
            (EMBEDDINGS, {"input": ["b"] * 2000, "instruction": "a" * 9000}, 422, "8,388 char"),
            (EMBEDDINGS, {"input": ["b"] * 2000, "prompt_name": "a:" * 5000}, 422, "8,388 char"),
            (RERANK, {"query": "a" * 9000, "documents": ["b"] * 2000}, 422, "8,388 characters"),
            ("/rerank", {"query": "a" * 9000, "texts": ["b"] * 2000}, 422, "each of 2,000 texts"),
            ("/rerank", {"query": "a", "texts": ["b"], "raw_scores": True}, 422, "raw_scores"),
            ("/nothing", {}, 404, "there are POST /v1/embeddings"),
        ],
    )
    def test_says_what_is_wrong(self, client, path, body, status, message):
        answer = client.post(path, body)
        assert answer.status == status, answer.content
        if path == RERANK:
            said = answer.json["message"]
        else:
            said = answer.json["error"]
            said = said if path == "/rerank" else said["message"]
        assert message in said

    def test_body_too_large(self, models):
        with running(lambda: models, limits=Limits(body=1000)) as client:
            # More than sockets hold: clients read an answer when they have sent the whole body.
            assert client.post(EMBEDDINGS, {"input": "a" * (8 << 20)}).status == 413
            # Chunked: nothing declares its size.
            connection = client.connect()
            chunks = (b"a" * 500 for _ in range(3))
            connection.request("POST", EMBEDDINGS, chunks, encode_chunked=True)
            assert connection.getresponse().status == 413
            connection.close()
            assert client.post(EMBEDDINGS, {"input": "a"}).status == 200

    def test_compressed_body(self, client):
        body = gzip.compress(b'{"input": "a"}')
        answer = client.post(EMBEDDINGS, body, **{"Content-Encoding": "gzip"})
        assert answer.status == 415
        assert "found Content-Encoding 'gzip'" in answer.json["error"]["message"]

    def test_queue_full(self, gated):
        limits = Limits(texts=4, queue=4)
        with (
            running(lambda: {"embedding": gated}, limits=limits) as client,
            ThreadPoolExecutor() as pool,
        ):
            first = gated.block(client, pool)
            second = pool.submit(client.post, EMBEDDINGS, {"input": ["a", "b"]})
            client.wait(lambda: client.metric("embedport_queued_texts") == 2)
            refused = client.post(EMBEDDINGS, {"input": ["a", "b"]})
            assert refused.status == 429
            assert refused.json["error"]["code"] == "queue_full"
            assert refused.headers["retry-after"] == "1"
            gated.gate.set()
            assert (first.result().status, second.result().status) == (200, 200)
            assert client.post(EMBEDDINGS, {"input": ["a", "b", "c", "d"]}).status == 200

    def test_nan_is_no_answer(self, gated):
        with running(lambda: {"embedding": gated}) as client:
            answer = client.post(EMBEDDINGS, {"input": ["fine", "undefined"]})
            assert answer.status == 500
            assert "input[1] gave NaN or infinity in fp32" in answer.json["error"]["message"]
            assert client.post(EMBEDDINGS, {"input": ["fine"]}).status == 200

    def test_a_failing_gpu_is_no_fault_of_the_request(self):
        assert as_refusal(InputError("a")).status == 400
        refusal = as_refusal(DeviceError("CUDA: cudaMalloc failed"))
        assert (refusal.status, refusal.message) == (500, "CUDA: cudaMalloc failed")

    def test_a_failing_text_fails_its_own_request(self, gated, caplog):
        with running(lambda: {"embedding": gated}) as client, ThreadPoolExecutor() as pool:
            answers = [gated.block(client, pool)]
            texts = ["fine", "fail", "fine too"]
            answers += [pool.submit(client.post, EMBEDDINGS, {"input": text}) for text in texts]
            client.wait(lambda: client.metric("embedport_queued_texts") == 3)
            gated.gate.set()
            assert [answer.result().status for answer in answers] == [200, 200, 500, 200]
            assert "does not run" in caplog.text


class TestClientThatLeaves:
    def test_its_texts_leave_the_queue(self, gated):
        with running(lambda: {"embedding": gated}) as client, ThreadPoolExecutor() as pool:
            first = gated.block(client, pool)
            connection = client.connect()
            connection.request("POST", EMBEDDINGS, json.dumps({"input": ["a", "b", "c"]}))
            client.wait(lambda: client.metric("embedport_queued_texts") == 3)
            connection.close()
            client.wait(lambda: client.metric("embedport_dropped_texts_total") == 3)
            gated.gate.set()
            assert first.result().status == 200
            assert sum(gated.batches) == 1


class TestState:
    def test_ready_after_the_warm_up(self, models):
        go = threading.Event()

        def load():
            go.wait(30)
            return models

        with running(load, ready=False) as client:
            answer = client.get("/health")
            assert (answer.status, answer.json) == (503, {"status": "starting"})
            refused = client.post(EMBEDDINGS, {"input": "a"})
            assert refused.status == 503
            assert refused.headers["retry-after"] == "1"
            assert [client.get(f"/v1/models{name}").status for name in ("", "/a")] == [503, 503]
            go.set()
            client.wait(lambda: client.get("/health").status == 200)
            assert client.post(EMBEDDINGS, {"input": "a"}).status == 200

    def test_a_model_that_does_not_load(self):
        errors = []

        def load():
            raise InputError("no such model")

        with running(load, ready=False, failed=errors.append) as client:
            client.wait(lambda: errors)
            assert client.get("/health").status == 503
        assert str(errors[0]) == "no such model"

    def test_models(self, client):
        listed = client.get("/v1/models").json["data"]
        assert [model["id"] for model in listed] == ["embedding", "reranker"]
        assert listed[0]["dimensions"] == 256
        assert client.get("/v1/models/embedding").json == listed[0]
        assert client.get("/v1/models/other").status == 404

    def test_key(self, models):
        with running(lambda: models, api_key="secret") as client:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
                for path in ("/v1/models", "/metrics"):
                    answer = client.get(path, **headers)
                    assert answer.status == 401
                    assert answer.json["error"]["code"] == "invalid_api_key"
            assert client.post(RERANK, {}).json["message"].startswith("a key is needed")
            assert client.get("/v1/models", authorization="Bearer secret").status == 200
            assert client.get("/health").status == 200

    def test_what_is_not_done_when_it_stops(self, gated, caplog):
        with ThreadPoolExecutor() as pool:
            with running(lambda: {"embedding": gated}, grace=0.1) as client:
                answers = [gated.block(client, pool)]
                answers += [pool.submit(client.post, RERANK, {"query": "a", "documents": 3})]
                answers += [pool.submit(client.post, EMBEDDINGS, {"input": "a"})]
                client.wait(lambda: client.metric("embedport_queued_texts") == 1)
                pool.submit(lambda: [answers[2].result(), gated.gate.set()])
            assert [answer.result().status for answer in answers] == [503, 400, 503]
        assert answers[2].result().json["error"]["code"] == "stopping"
        assert "Exception" not in caplog.text


class TestCommand:
    def test_a_signal_before_the_port_answers(self, runners, monkeypatch):
        """uvicorn's handlers come later: a signal until then was lost."""

        run = uvicorn.Server.run

        def start(server, **options):
            assert server.config.timeout_keep_alive > 60  # what load balancers do
            signal.raise_signal(signal.SIGTERM)
            run(server, **options)

        monkeypatch.setattr(uvicorn.Server, "run", start)
        again = threading.Timer(20, signal.raise_signal, [signal.SIGTERM])
        again.start()
        serve([str(runners["embedding"].info.folder)], port=0)
        assert again.is_alive()
        again.cancel()

    def test_stops_when_told_to(self, runners):
        """Requests at work are answered; then it exits with 0."""
        folder = runners["embedding"].info.folder
        process = subprocess.Popen(
            [sys.executable, "-m", "embedport", "serve", str(folder), "--port", "0"],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        listening = process.stderr.readline()
        client = Client(int(listening.partition("127.0.0.1:")[2].split()[0]))
        client.wait(lambda: client.get("/health").status == 200)
        with ThreadPoolExecutor() as pool:
            texts = [f"{i} " + "many words " * 100 for i in range(40)]
            body = {"input": texts, "model": folder.name}
            answer = pool.submit(client.post, EMBEDDINGS, body)
            client.wait(lambda: client.metric("embedport_queued_texts") > 0)
            with socket.create_connection(("127.0.0.1", client.port)) as connection:
                connection.sendall(b"no HTTP\r\n\r\n")
                assert connection.recv(12) == b"HTTP/1.1 400"
            # Java's HttpClient offers HTTP/2 with each request.
            offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c"}
            offer |= {"HTTP2-Settings": ""}
            assert client.post(EMBEDDINGS, {"input": "tea"}, **offer).status == 200
            os.kill(process.pid, signal.SIGTERM)
            assert len(vectors(answer.result())) == 40
        assert process.wait(30) == 0
        said = process.stderr.read().splitlines()
        assert (len(said), said[-1]) == (2, "embedport: stopped")  # after the model's line
        process.stderr.close()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["nowhere"], "no such folder"),
            (["{folder}", "{folder}"], "would both be served as"),
            (["{folder}", "--max-queue", "5"], "at least the 2,048 texts of one request"),
            (["{folder}", "--max-length", "999999"], "--max-length should be from 1 to"),
            (["{folder}", "--task", "other"], "task should be one of embedding, reranker"),
            (["{folder}", "--task", "reranker"], "its manifest says 'embedding'"),
            (["{folder}", "--api-key-file", "{folder}/none"], "cannot be read"),
            (["{folder}", "--host", "192.0.2.1"], "cannot listen on 192.0.2.1:8000"),
        ],
    )
    def test_one_line(self, runners, monkeypatch, capsys, arguments, message):
        from embedport.cli import main

        folder = runners["embedding"].info.folder
        filled = [argument.format(folder=folder) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["embedport", "serve", *filled])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2
        assert message in said[-1]
