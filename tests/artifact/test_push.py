"""Push and load against a stand-in of the hub's API, with the hub's own client."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import yaml

import embedport
from embedport.artifact.folder import Artifact, record_parity
from embedport.artifact.push import prepare
from embedport.errors import ArtifactError

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Repositories in memory: what the client asks of huggingface.co for a push and a download."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.created, self.commits, self.stored = {}, [], [], {}
        self.large, self.forbidden = 1_000_000, False

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, format, *args):
        pass

    @property
    def hub(self):
        assert isinstance(self.server, Hub)
        return self.server

    def body(self):
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def answer(self, status, content=b"", **headers):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"content-length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_POST(self):
        hub, body = self.hub, self.body()
        if hub.forbidden or self.headers.get("authorization") != "Bearer hf_secret":
            self.answer(403, {"error": "no rights to write"})
        elif self.path == "/api/repos/create":
            hub.created.append(json.loads(body))
            self.answer(200, {"url": f"{hub.address}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            for file in files:
                mode = "lfs" if file["size"] > hub.large else "regular"
                file |= {"uploadMode": mode, "shouldIgnore": False}
            self.answer(200, {"files": files})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {
                    **entry,
                    "actions": {"upload": {"href": f"{hub.address}/lfs/{entry['oid']}"}},
                }
                for entry in json.loads(body)["objects"]
            ]
            self.answer(
                200,
                {"transfer": "basic", "objects": objects},
                **{"content-type": "application/vnd.git-lfs+json"},
            )
        else:
            assert "/commit/" in self.path
            rows = [json.loads(line) for line in body.splitlines()]
            for row in rows:
                value = row["value"]
                if row["key"] == "file":
                    hub.files[value["path"]] = base64.b64decode(value["content"])
                elif row["key"] == "lfsFile":
                    hub.files[value["path"]] = hub.stored[value["oid"]]
            hub.commits.append([row["key"] for row in rows])
            url = f"{hub.address}/me/model/commit/{COMMIT}"
            self.answer(200, {"success": True, "commitOid": COMMIT, "commitUrl": url})

    def do_PUT(self):
        data = self.body()
        self.hub.stored[self.path.rpartition("/")[2]] = data
        assert hashlib.sha256(data).hexdigest() in self.path
        self.answer(200)

    def do_GET(self):
        hub = self.hub
        if self.path.startswith("/api/models/Qwen/"):
            self.answer(200, {"id": "Qwen/base", "cardData": {"license": "apache-2.0"}})
        elif self.path.startswith("/api/models/me/model/tree/"):
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in hub.files.items()
            ]
            self.answer(200, files)
        elif self.path.startswith("/api/models/me/model"):
            siblings = [{"rfilename": name} for name in hub.files]
            self.answer(200, {"id": "me/model", "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(r"/me/model/resolve/\w+/(.+)", self.path):
            data = hub.files[found[1]]
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            self.answer(200, data, ETag=etag, **{"X-Repo-Commit": COMMIT})
        else:
            self.answer(404, {"error": "not found"})

    def do_HEAD(self):
        self.do_GET()


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("push") / "model"
    embedport.export(checkpoints("kv2"), folder, consumers=["sentence-transformers"])
    gates = [{"name": "minimum cosine", "value": 0.9999, "passed": True}]
    parity = {"inputs": 3, "library": "sentence-transformers 6.2.0", "gates": gates}
    record_parity(Artifact.open(folder), parity, "| a table |")
    return folder


@pytest.fixture
def run(hub, tmp_path):
    def call(*arguments, token="hf_secret"):
        environment = os.environ | {
            "HF_ENDPOINT": hub.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_TOKEN": token,
        }
        return subprocess.run(
            [sys.executable, "-m", "embedport", *map(str, arguments)],
            env=environment,
            capture_output=True,
            text=True,
        )

    return call


def test_what_was_pushed_is_loaded(hub, run, folder):
    hub.large = 100_000  # some files go the way of large ones
    found = run("push", folder, "me/model", "--private", "--license", "mit")
    assert found.returncode == 0, found.stderr
    assert found.stdout == f"{hub.address}/me/model/commit/{COMMIT}\n"
    assert hub.created[0]["name"] == "model"
    # Which of the two depends on the client's version.
    assert hub.created[0].get("private") or hub.created[0]["visibility"] == "private"
    (keys,) = hub.commits
    assert {"file", "lfsFile"} < set(keys)
    manifest = embedport.Artifact.open(folder).manifest
    assert set(hub.files) == {*manifest.files, "embedport.json", "README.md"}
    for name in set(hub.files) - {"README.md", "embedport.json"}:
        assert hub.files[name] == (folder / name).read_bytes()
    # The checkpoint's folder is nobody's business; all else of the manifest is as it was.
    source = manifest.source.id
    sent, own = (
        json.loads(x)
        for x in (hub.files["embedport.json"], (folder / "embedport.json").read_bytes())
    )
    assert sent["source"].pop("id") == Path(source).name != own["source"].pop("id") == source
    assert sent == own
    assert not [name for name, data in hub.files.items() if source.encode() in data]

    _, front, body = hub.files["README.md"].decode().split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["license"] == "mit"
    assert (card["library_name"], card["pipeline_tag"]) == ("onnx", "sentence-similarity")
    assert {"embedport", "onnxruntime", "sentence-transformers", "fp32"} <= set(card["tags"])
    (result,) = card["model-index"][0]["results"]
    assert result["metrics"] == [
        {"type": "minimum_cosine", "value": 0.9999, "name": "minimum cosine"}
    ]
    assert 'embedport.load("me/model")' in body
    assert "| a table |" in body

    loaded = run("encode", "me/model", "a text", "--json")
    assert loaded.returncode == 0, loaded.stderr
    embedder = embedport.load(folder, device="cpu")
    assert isinstance(embedder, embedport.Embedder)
    vector = json.loads(loaded.stdout)["embedding"]
    np.testing.assert_allclose(vector, embedder.encode(["a text"])[0], atol=1e-6)


def test_without_a_token_nothing_is_sent(hub, run, folder, copied):
    folder = copied(folder)
    path = folder / "embedport.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["id"], manifest["precision"] = "Qwen/base", "int8"
    path.write_text(json.dumps(manifest))
    found = run("push", folder, "me/model", token="")
    assert found.returncode == 0, found.stderr
    assert "no token" in found.stderr
    assert hub.created == hub.commits == []
    assert "onnx/model.onnx" in found.stdout
    card = yaml.safe_load(found.stdout.split("---\n")[1])
    assert (card["base_model"], card["base_model_relation"]) == ("Qwen/base", "quantized")
    assert card["license"] == "apache-2.0"


def test_a_checkpoint_in_the_working_folder(folder, copied):
    made = copied(folder)
    manifest = json.loads((made / "embedport.json").read_text())
    manifest["source"]["id"] = "."
    (made / "embedport.json").write_text(json.dumps(manifest))
    publication = prepare(made, "me/model", license="mit")
    assert 'embedport.load("me/model")' in publication.card
    assert json.loads(publication.manifest)["source"]["id"] == "."


def test_folders_of_other_machines(folder, copied):
    """A quantized checkpoint's original, and the reference that the artifact was compared with."""
    made = copied(folder)
    path = made / "embedport.json"
    manifest = json.loads(path.read_text())
    manifest["source"]["original"] = ["--reference", "/home/ann/base", "--adapter", "me/lora@abc"]
    path.write_text(json.dumps(manifest))
    reference = "/home/bob/my models/base at 1 with /home/bob/lora"
    parity = {"inputs": 3, "library": "x", "gates": [], "reference": reference}
    step = "Compare it with its own checkpoint: that of /home/bob/lora has another."
    table = f"| Reference | {reference} |\n{step}"
    record_parity(Artifact.open(made), parity | {"next_steps": [step]}, table)
    publication = prepare(made, "me/model", license="mit")
    for text in (publication.manifest, publication.card):
        assert "/home/" not in text
        assert "base at 1 with lora" in text
        assert "that of lora has another" in text
    sent = json.loads(publication.manifest)
    assert sent["source"]["original"] == ["--reference", "base", "--adapter", "me/lora@abc"]
    assert sent["graph"] == manifest["graph"]


@pytest.mark.parametrize(
    "damage", [{"gates": None}, {"gates": [{"name": 7, "value": 1}]}, {"mteb": 1}]
)
def test_figures_that_validate_did_not_write(folder, copied, damage):
    made = copied(folder)
    manifest = json.loads((made / "embedport.json").read_text())
    manifest["parity"] = {"inputs": 1, "library": "x", "gates": [], **damage}
    (made / "embedport.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=r"embedport\.json: parity is not what .* wrote"):
        prepare(made, "me/model", license="mit")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "me/model"], "me/model was not pushed"),
        (["{folder}", "model"], "of the form owner/name, found 'model'"),
        (["{folder}/onnx", "me/model"], "is not an artifact"),
    ],
)
def test_one_line(hub, run, folder, arguments, message):
    hub.forbidden = True
    found = run("push", *(argument.format(folder=folder) for argument in arguments))
    assert found.returncode == 2
    assert message in found.stderr.splitlines()[-1]
    assert not hub.commits
