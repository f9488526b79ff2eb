"""Embedder and Reranker through onnxruntime, and what they do with bad input."""

import json
import logging
import os
import shutil
import subprocess
import sys
from threading import Event
from typing import Any
from unittest import mock

import numpy as np
import pytest

import embedport
from embedport import integrity
from embedport.artifact.manifest import Manifest
from embedport.errors import ArtifactError, CheckpointError, DeviceError, InputError, require
from embedport.runtimes import loading
from embedport.texts.prompts import DEFAULT_INSTRUCTION, query_prompt


@pytest.fixture(scope="module")
def embedder(folders):
    return embedport.load(folders / "embedding", device="cpu")


@pytest.fixture(scope="module")
def reranker(folders):
    return embedport.load(folders / "reranker", device="cpu")


def test_kinds(embedder, reranker):
    assert isinstance(embedder, embedport.Embedder)
    assert isinstance(reranker, embedport.Reranker)
    assert embedder.device == "cpu"
    assert "dim=64" in repr(embedder)
    assert "cpu" in repr(reranker)


def test_the_other_task_is_refused(folders, checkpoints):
    """A reranker run as an embedding model would give vectors that mean nothing."""
    for model in (folders / "reranker", checkpoints("kv2", "reranker")):
        with pytest.raises(InputError, match=r"is a reranker: use embedport\.load_reranker"):
            embedport.load_embedder(model, device="cpu")
    for model in (folders / "embedding", checkpoints("kv2", "embedding")):
        with pytest.raises(InputError, match=r"is an embedding model: use embedport\.load_emb"):
            embedport.load_reranker(model, device="cpu")


@pytest.mark.parametrize("asked", [None, "0"])
def test_no_telemetry_unless_asked_for(tmp_path, asked):
    """onnxruntime reads the variable on import, and writes a device id unless it is 1.

    Under CI it writes none in either case, so the variable is checked too.
    """
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    environment |= {} if asked is None else {"ORT_DISABLE_TELEMETRY": asked}
    code = (
        "import os; from embedport.errors import require; require('onnxruntime', 'cpu');"
        "print(os.environ['ORT_DISABLE_TELEMETRY'])"
    )
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == (asked or "1")
    assert asked or not list(tmp_path.rglob("deviceid"))


def test_telemetry_stops_if_onnxruntime_is_there_already(monkeypatch):
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    with mock.patch("onnxruntime.disable_telemetry_events") as disable:
        require("onnxruntime", "cpu")
        require("onnxruntime", "cpu")
    disable.assert_called_once_with()


def test_the_tokenizer_is_read_while_the_graph_opens(folders, monkeypatch):
    """Not before, and not behind it: opening ends only when reading has begun."""
    asked, reading = Event(), Event()

    class Opening(loading.OnnxModel):
        def __init__(self, artifact, device, parsed):
            def told():
                asked.set()
                parsed()
                assert reading.wait(60)

            super().__init__(artifact, device, told)

    class Read(loading.EmbeddingTokenizer):
        def __init__(self, *arguments):
            assert asked.is_set()
            reading.set()
            super().__init__(*arguments)

    monkeypatch.setattr(loading, "OnnxModel", Opening)
    monkeypatch.setattr(loading, "EmbeddingTokenizer", Read)
    model = embedport.load_embedder(folders / "embedding", device="cpu")
    assert model.encode(["a"]).shape == (1, 64)


@pytest.mark.parametrize("error", [FileNotFoundError(2, "gone"), OSError(5, "Input/output error")])
def test_files_that_go_while_they_are_checked(folders, monkeypatch, error):
    """Deleted by another run, or on a disk that fails."""
    monkeypatch.setattr(integrity, "_record", mock.Mock(side_effect=error))
    with pytest.raises(ArtifactError, match=rf"embedding cannot be read: .*{error.strerror}"):
        embedport.load(folders / "embedding", device="cpu")


@pytest.mark.parametrize("kind", ["artifact", "checkpoint"])
def test_replaced_while_it_is_loaded(folders, checkpoints, copied, monkeypatch, kind):
    """It would run the weights of one with the settings and tokens of the other."""
    model = folders / "embedding" if kind == "artifact" else checkpoints("kv2")
    folder, name = copied(model), "OnnxModel" if kind == "artifact" else "TorchModel"
    opened: Any = getattr(loading, name)

    def replacing(*arguments):
        folder.rename(folder.with_name("earlier"))
        shutil.copytree(model, folder)
        return opened(*arguments)

    monkeypatch.setattr(loading, name, replacing)
    error = ArtifactError if kind == "artifact" else CheckpointError
    with pytest.raises(error, match="was changed or replaced while"):
        embedport.load(folder, device="cpu")
    monkeypatch.undo()
    assert embedport.load(folder, device="cpu").device == "cpu"


def test_prompts(embedder):
    query = embedder.encode(["gravity"], prompt="query")
    literal = embedder.encode(["gravity"], prompt=query_prompt(DEFAULT_INSTRUCTION))
    document = embedder.encode([query_prompt(DEFAULT_INSTRUCTION) + "gravity"])
    np.testing.assert_array_equal(query, literal)
    np.testing.assert_array_equal(query, document)
    assert (query * embedder.encode(["gravity"])).sum() < 0.999
    with pytest.raises(InputError, match="no prompt is named 'qurey'; there are document, query"):
        embedder.encode(["gravity"], prompt="qurey")
    with pytest.raises(InputError, match=r"no prompt is named 'retrieval\.query'"):  # Jina's
        embedder.encode(["gravity"], prompt="retrieval.query")


def test_empty(embedder, reranker):
    assert embedder.encode([]).shape == (0, 64)
    assert embedder.encode([], dim=8).shape == (0, 8)
    assert reranker.score([]).shape == (0,)
    assert reranker.rank("query", []) == []
    assert np.isfinite(embedder.encode([""])).all()


def test_order_and_budget_change_nothing(embedder):
    texts = ["a", "some longer text " * 20, "mid length text", "a"]
    one = embedder.encode(texts, batch_tokens=1)
    np.testing.assert_allclose(embedder.encode(texts), one, atol=1e-6)
    np.testing.assert_allclose(embedder.encode(texts[::-1])[::-1], one, atol=1e-6)
    np.testing.assert_array_equal(one[0], one[3])


@pytest.mark.parametrize("dim", [0, 65, -1])
def test_dim_out_of_range(embedder, dim):
    with pytest.raises(InputError, match=f"dim should be from 1 to 64, found {dim}"):
        embedder.encode(["a"], dim=dim)


def test_dim_is_checked_before_any_text(embedder):
    with pytest.raises(InputError, match=r"dim should be an integer, found 8\.0"):
        embedder.encode(["a"], dim=8.0)
    assert embedder.encode(["a"], dim=np.int64(8)).shape == (1, 8)
    np.testing.assert_allclose(embedder.encode(["a"], dim=64), embedder.encode(["a"]), atol=1e-6)


def test_what_is_no_integer(embedder, reranker):
    """True counts as 1 elsewhere: a text would be cut to one token, a vector to one value."""
    folder: Any = embedder.artifact.folder
    for name, call in {
        "dim": lambda x: embedder.encode(["a"], dim=x),
        "batch_tokens": lambda x: embedder.encode(["a"], batch_tokens=x),
        "top_k": lambda x: reranker.rank("a", ["b"], top_k=x),
        "max_length": lambda x: embedport.load(folder, device="cpu", max_length=x),
    }.items():
        for value in (True, 8.0, "8"):
            with pytest.raises(InputError, match=f"{name} should be an integer, found {value!r}"):
                call(value)
    length: Any = np.int64(8)
    assert embedport.load(folder, device="cpu", max_length=length).tokenizer.max_length == 8


def test_generators(embedder, reranker):
    texts = ["one", "two"]
    np.testing.assert_array_equal(embedder.encode(iter(texts)), embedder.encode(texts))
    assert reranker.rank("query", iter(texts)) == reranker.rank("query", texts)
    pairs = [("query", text) for text in texts]
    np.testing.assert_array_equal(reranker.score(iter(pairs)), reranker.score(pairs))


def test_rank(reranker):
    # So many equal ones that a sort that is not stable would reorder them.
    documents = ["one", "two", "three", *["one"] * 60]
    scores = reranker.score([("query", document) for document in documents])
    ranking = reranker.rank("query", documents)
    assert [ranked.index for ranked in ranking] == np.argsort(-scores, kind="stable").tolist()
    assert [ranked.document for ranked in ranking] == [documents[r.index] for r in ranking]
    assert reranker.rank("query", documents, top_k=2) == ranking[:2]
    assert ((scores > 0) & (scores < 1)).all()
    other = reranker.score([("query", "one")], instruction="Judge something else")
    assert other != scores[0]
    with pytest.raises(InputError, match="top_k should be at least 1"):
        reranker.rank("query", documents, top_k=0)
    with pytest.raises(InputError, match="documents should be a list"):
        reranker.rank("query", "one string")


def test_long_text_is_cut_and_said(folders, caplog):
    embedder = embedport.load_embedder(folders / "embedding", device="cpu", max_length=16)
    with caplog.at_level(logging.WARNING):
        vectors = embedder.encode(["short", "word " * 40_000])
    assert "1 of 2 texts cut to 16 tokens, the first is text 1" in caplog.text
    ids = embedder.tokenizer.encode(["word " * 99]).ids[0].tolist()
    cut = embedder.tokenizer.tokenizer.decode(ids)
    np.testing.assert_allclose(vectors[1], embedder.encode([cut])[0], atol=1e-6)
    with pytest.raises(InputError, match="max_length should be from 1 to 32768, found 99999"):
        embedport.load(folders / "embedding", max_length=99999)


def test_lone_surrogate(embedder):
    with pytest.raises(InputError, match="lone surrogate"):
        embedder.encode(["fine", "\ud83d"])


def test_token_beyond_the_table(tmp_path, checkpoints, copied, small_tokenizer):
    """Some checkpoints' tokenizers know special tokens that their table has no row for."""
    from tests.synthetic import Geometry, write_checkpoint

    size = small_tokenizer.get_vocab_size() - 1
    geometry = Geometry(64, 1, 4, 2, 32, 160, vocab_size=size)
    write_checkpoint(tmp_path / "checkpoint", geometry, "embedding", small_tokenizer)
    embedport.export(tmp_path / "checkpoint", tmp_path / "out")
    embedder = embedport.load_embedder(tmp_path / "out", device="cpu")
    with pytest.raises(InputError, match=rf"text 1 holds token {size}, .* only {size} rows"):
        embedder.encode(["fine", "</think>"])


def test_nan_is_refused(embedder, reranker, monkeypatch):
    """A row of NaN would stay in an index for ever."""
    monkeypatch.setattr(embedder, "model", lambda ids, mask: np.full((len(ids), 64), np.nan, "f4"))
    with pytest.raises(InputError, match=r"2 of 2 texts gave NaN or infinity in fp32, .* text 0"):
        embedder.encode(["a", "b"])
    assert np.isnan(embedder.embed_texts(["a", "b"])).all()
    scores = np.array([0.5, np.inf], np.float32)
    monkeypatch.setattr(reranker, "score_rows", lambda *_, **options: scores)
    pairs = [("a", "b"), ("a", "c")]
    with pytest.raises(InputError, match=r"1 of 2 pairs gave NaN or infinity in fp32, .* pair 1"):
        reranker.score(pairs)
    assert reranker.score_pairs(pairs) is scores


def test_devices(folders):
    with pytest.raises(InputError, match="device should be auto, cpu, cuda, tensorrt; found 'tpu'"):
        embedport.load(folders / "embedding", device="tpu")
    import onnxruntime

    for device, provider in (
        ("cuda", "CUDAExecutionProvider"),
        ("tensorrt", "TensorrtExecutionProvider"),
    ):
        if provider not in onnxruntime.get_available_providers():
            with pytest.raises(DeviceError, match=f"this onnxruntime has no {provider}"):
                embedport.load(folders / "embedding", device=device)
    assert embedport.load(folders / "embedding", device="auto").device in ("cpu", "cuda")


def test_a_text_too_long_for_the_memory(tmp_path, checkpoints, monkeypatch):
    """The standard dialect's attention is quadratic in the length: refused, not killed."""
    from embedport.runtimes import onnxruntime as adapter

    embedport.export(checkpoints("kv2"), tmp_path / "out", dialect="standard")
    embedder = embedport.load_embedder(tmp_path / "out", device="cpu")
    monkeypatch.setattr(adapter, "available_memory", lambda: 10 * 2**20)
    assert embedder.encode(["short"]).shape == (1, 64)
    with pytest.raises(
        InputError, match=r"takes 7.* GB on a CPU in the standard dialect.* `dialect` ort"
    ):
        embedder.encode(["word " * 5_000])
    monkeypatch.setattr(adapter, "available_memory", lambda: None)
    assert embedder.encode(["word " * 50]).shape == (1, 64)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells a process its peak")
@pytest.mark.parametrize("kernels", ["with", pytest.param("without", marks=pytest.mark.slow)])
def test_memory_of_a_long_text_is_linear(embedder, kernels):
    """Without kernels attention takes onnxruntime's flash kernel: 8,000 tokens in a child."""
    import subprocess
    import sys

    code = (
        "import embedport, pathlib, sys\n"
        "import embedport.runtimes.onnxruntime as adapter\n"
        "def peak():\n"  # getrusage begins with the parent's
        "    lines = pathlib.Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM'))\n"
        "if sys.argv[2] == 'without': adapter.register_kernels = lambda options: False\n"
        "embedder = embedport.load(sys.argv[1], device='cpu')\n"
        "embedder.encode(['short'])\n"
        "before = peak()\n"
        "ids = embedder.tokenizer.encode(['word ' * 20_000]).ids[0][:8_000]\n"
        "assert len(ids) == 8_000\n"
        "embedder.model(ids[None], ids[None] * 0 + 1)\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, str(embedder.artifact.folder), kernels]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    # All scores of 4 heads would take 1 GB.
    assert int(found.stdout) * 1024 < 2.5e8


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_manifest_of_version_4(folders, copied, task):
    """It had prompts, and no other inputs and outputs than those of Qwen's own models."""
    path = copied(folders / task) / "embedport.json"
    expected = Manifest.from_json(path)
    values = json.loads(path.read_text()) | {"format_version": 4}
    values["prompts"] = values.pop("inputs")["prompts"]
    del values["outputs"]
    path.write_text(json.dumps(values))
    assert Manifest.from_json(path) == expected


CALIBRATION = {"texts": 1, "source": "a", "sha256": ""}
RECIPE = {"formats": {}, "algorithm": "rtn"}


class TestDamagedArtifact:
    @pytest.fixture
    def folder(self, folders, copied):
        return copied(folders / "embedding")

    @pytest.mark.parametrize("name", ["onnx/model.onnx_data", "onnx/model.onnx", "tokenizer.json"])
    def test_changed_byte(self, folder, name):
        embedport.load(folder, device="cpu")
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(ArtifactError, match=f"{name} has changed since it was written"):
            embedport.load(folder)

    @pytest.mark.parametrize("name", ["chat_template.jinja", "special_tokens_map.json"])
    def test_a_file_that_would_change_tokens(self, folder, name):
        (folder / name).write_text("{}")
        with pytest.raises(ArtifactError, match=f"{name} was added to the artifact"):
            embedport.load(folder, device="cpu")

    def test_missing_and_truncated(self, folder):
        data = folder / "onnx/model.onnx_data"
        content = data.read_bytes()
        data.write_bytes(content[:-1])
        with pytest.raises(ArtifactError, match=r"should have .* bytes, found"):
            embedport.load(folder)
        data.unlink()
        with pytest.raises(ArtifactError, match="is missing; the manifest lists it"):
            embedport.load(folder)

    def change(self, folder, **changes):
        values = json.loads((folder / "embedport.json").read_text())
        values.update(changes)
        (folder / "embedport.json").write_text(json.dumps(values))

    @pytest.mark.parametrize(
        ("version", "advice"), [(99, "upgrade embedport"), (1, "make the artifact again")]
    )
    def test_another_format(self, folder, version, advice):
        self.change(folder, format_version=version)
        with pytest.raises(ArtifactError, match=rf"format version {version}.*{advice}"):
            embedport.load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"format": "checkpoint"}, "format 'checkpoint' does not go with graph {"),
            ({"graph": None}, "format 'onnx' does not go with graph None"),
            ({"format": "tensorrt"}, "format 'tensorrt' does not go with engine None"),
            ({"format": 3}, "format should be one of onnx, tensorrt, checkpoint, found 3"),
            ({"format": "tensorrt", "engine": {"device": 1}}, "is damaged"),
        ],
    )
    def test_a_graph_and_an_engine_go_with_their_format(self, folder, changes, message):
        self.change(folder, **changes)
        with pytest.raises(ArtifactError, match=message):
            embedport.load(folder)

    def test_bad_manifests(self, folder):
        self.change(folder, surprise=1)
        with pytest.raises(ArtifactError, match="missing or unknown keys: surprise"):
            embedport.load(folder)
        (folder / "embedport.json").write_text("[]")
        with pytest.raises(ArtifactError, match="is not a manifest"):
            embedport.load(folder)
        (folder / "embedport.json").unlink()
        # What is left would be a checkpoint.
        with pytest.raises(CheckpointError, match=r"has neither model\.safetensors nor"):
            embedport.load(folder)
        with pytest.raises(InputError, match="no such folder"):
            embedport.load(folder / "nowhere")

    @pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd"])
    def test_path_outside_the_folder(self, folder, name):
        graph = json.loads((folder / "embedport.json").read_text())["graph"]
        self.change(folder, graph=graph | {"path": name})
        with pytest.raises(ArtifactError, match="is outside the artifact's folder"):
            embedport.load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"task": None}, "task should be embedding or reranker, found None"),
            ({"vocab_size": "7"}, "vocab_size should be a whole number, found '7'"),
            (
                {"inputs": {"prompts": {"query": 1}}},
                r"inputs\.prompts\.query should be a text, found 1",
            ),
            ({"inputs": {"prompts": 5}}, "prompts should be texts by name, found 5"),
            ({"inputs": {"truncation_side": "up"}}, "truncation_side should be left or right"),
            ({"inputs": {"lower_case": 2**31}}, "lower_case should be true or false"),
            ({"recipe": [1]}, "recipe should be an object or null"),
            ({"recipe": {}}, "the recipe's formats should be texts by name"),
            ({"engine": {}}, "missing or unknown keys of engine: "),
            ({"ranges": {"64": None}}, "ranges at 64 should be two lists of 64 numbers"),
            ({"recipe": RECIPE | {"algorithm": 5}}, "the recipe's algorithm should be a name"),
            ({"recipe": RECIPE | {"calibration": []}}, "calibration should be null, or texts"),
            (
                {"recipe": RECIPE | {"calibration": {"texts": 1, "source": "a"}}},
                "the recipe's calibration should be null, or texts, source and sha256",
            ),
            (
                {"recipe": RECIPE | {"calibration": CALIBRATION | {"tokens": "9"}}},
                "the recipe's calibration should be null, or texts, source and sha256",
            ),
            ({"ranges": {"3": [[0, 0], [1, 1]]}}, "ranges at 3 should be two lists of 3"),
            ({"ranges": {"2": [[0, 0], [1, "x"]]}}, "ranges at 2 should be two lists of 2"),
            ({"ranges": {"2": [[0, 0], [1, -1]]}}, "ranges at 2 should be two lists of 2"),
            ({"ranges": {"2": [[0, 0], [1, 1e999]]}}, "is not a manifest|ranges at 2 should be"),
            ({"files": {}}, "'onnx/model.onnx' is not among its files"),
            ({"files": {"a" * 300: {"size": 1, "sha256": ""}}}, "cannot be a file's name"),
        ],
    )
    def test_values_of_other_types(self, folder, changes, message):
        inputs = json.loads((folder / "embedport.json").read_text())["inputs"]
        self.change(folder, **changes | {"inputs": inputs | changes.get("inputs", {})})
        with pytest.raises(ArtifactError, match=message):
            embedport.load(folder)

    def test_missing_inputs_have_no_defaults(self, folder):
        """Without its prompts a query would give another vector."""
        self.change(folder, inputs={})
        with pytest.raises(ArtifactError, match="its inputs lack form"):
            embedport.load(folder)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"embedding_dim": 63}, r"embedding_dim is 63 .* gives batch x 64: one of them"),
            ({"embedding_dim": None}, "embedding_dim is None"),
            ({"graph": {"output": "hidden"}}, "output hidden, and onnx/model.onnx gives batch x"),
            ({"graph": {"output": "x"}}, "graph's output should be pooled or hidden, found 'x'"),
            ({"outputs": {"pooling": []}}, "pooling should be names"),
            ({"outputs": {"steps": {}}}, "steps should be a list, found {}"),
            ({"outputs": {"truncate": 8}}, "embedding_dim should be within truncate, found 64"),
        ],
    )
    def test_vectors_that_the_graph_does_not_give(self, folder, changes, message):
        values = json.loads((folder / "embedport.json").read_text())
        for key, value in changes.items():
            values[key] = values[key] | value if isinstance(value, dict) else value
        self.change(folder, **values)
        with pytest.raises(ArtifactError, match=message):
            embedport.load(folder, device="cpu")

    def test_another_width_than_the_checkpoints(self, quantized, copied):
        folder = copied(quantized("w8a8"))
        self.change(folder, embedding_dim=7)
        with pytest.raises(ArtifactError, match="embedding_dim should be 128, as the checkpoint's"):
            embedport.load(folder, device="cpu")

    def test_outputs_that_the_graph_does_not_have(self, folder):
        graph = json.loads((folder / "embedport.json").read_text())["graph"]
        for outputs, message in (
            ([], "outputs should be names"),
            ([3, "x"], "outputs should be a text, found 3"),
            (["x"], "and give x, as"),
        ):
            self.change(folder, graph=graph | {"outputs": outputs})
            with pytest.raises(ArtifactError, match=message):
                embedport.load(folder, device="cpu")

    def test_graph_that_onnxruntime_does_not_take(self, folder):
        from embedport.artifact.folder import write_manifest
        from embedport.artifact.manifest import Manifest

        (folder / "onnx/model.onnx").write_bytes(b"not a graph")
        write_manifest(folder, Manifest.from_json(folder / "embedport.json"), "artifact")
        with pytest.raises(ArtifactError, match=r"does not take the graph \(it needs onnxruntime"):
            embedport.load(folder)
