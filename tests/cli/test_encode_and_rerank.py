"""The verbs that run a model: encode and rerank."""

import json
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest

import embedport
from embedport.errors import InputError
from embedport.runtimes.bulk import INDEX

TEXTS = ["What is the capital of China?", "Explain gravity", "日本語 🥾"]


def json_lines(text):
    return [json.loads(line) for line in text.splitlines()]


class TestEncode:
    def test_arguments_as_json(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", *TEXTS, "--prompt", "query")
        assert code == 0
        rows = json_lines(out)
        assert [row["text"] for row in rows] == TEXTS
        embedder = embedport.load_embedder(folders / "embedding")
        expected = embedder.encode(TEXTS, prompt="query")
        np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)

    def test_files(self, run, folders, tmp_path):
        (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
        rows = "\n".join(json.dumps({"text": text}) for text in TEXTS)
        (tmp_path / "in.jsonl").write_text(rows, encoding="utf-8")
        expected = embedport.load(folders / "embedding").encode(TEXTS, dim=16)  # ty: ignore
        for name in ("in.txt", "in.jsonl"):
            code, out, err = run(
                *("encode", folders / "embedding", "--input", tmp_path / name),
                *("--dim", 16, "-o", tmp_path / f"{name}.npy"),
            )
            assert (code, out) == (0, "")
            assert "3 vectors of 16, on cpu" in err
            found = np.load(tmp_path / f"{name}.npy")
            np.testing.assert_allclose(found, expected, atol=1e-6)
        run("encode", folders / "embedding", *TEXTS, "-o", tmp_path / "out.jsonl")
        found = json_lines((tmp_path / "out.jsonl").read_text())
        assert [set(row) for row in found] == [{"text", "embedding"}] * 3
        assert not list(tmp_path.glob(".*partial*"))

    def test_ids_of_a_file(self, run, folders, tmp_path):
        """Results can be joined to the user's own rows, whatever their order."""
        rows = [{"_id": "doc-1", "text": "tea"}, {"id": 7, "text": "car"}, {"text": "a"}]
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
        ids = {"tea": "doc-1", "car": "7", "a": "2"}
        for verb in (("encode", folders / "embedding"), ("rerank", folders / "reranker", "query")):
            command = (*verb, "--input", tmp_path / "in.jsonl")
            assert run(*command, "-o", tmp_path / f"{verb[0]}.jsonl")[0] == 0
            printed = run(*command)[1]
            assert printed == (tmp_path / f"{verb[0]}.jsonl").read_text()
            found = json_lines(printed)
            key = "text" if verb[0] == "encode" else "document"
            assert {row[key]: row["id"] for row in found} == ids
        assert " doc-1 " in run(*command, terminal=True)[1]

    def test_a_folder_of_shards(self, run, folders, tmp_path):
        corpus, output = tmp_path / "corpus.jsonl", tmp_path / "vectors"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        command = ("encode", folders / "embedding", "--input", corpus, "-o", f"{output}/")
        code, out, err = run(*command, "--prompt", "query")
        assert (code, out) == (0, "")
        assert f"{output}: 3 vectors of 64 in 1 shard\n" in err
        for more, message in (
            ((), "whose prompt was"),
            (("--engine", "spark"), "engine should be one of local, ray, found 'spark'"),
            (("--workers", "2"), "--workers goes with --engine ray"),
        ):
            code, _, err = run(*command, *more)
            assert (code, err.count("\n")) == (2, 1)
            assert message in err
        dotted = tmp_path / "qwen3-0.6B"  # no file of the kind ".6B"
        assert run(*command[:-1], f"{dotted}/")[0] == 0
        assert (dotted / INDEX).is_file()
        code, _, err = run("encode", folders / "embedding", "--input", "-", "-o", f"{output}/")
        assert (code, "give --input FILE" in err) == (2, True)

    def test_an_interrupted_folder_says_how_to_go_on(
        self, run, folders, tmp_path, monkeypatch, caplog
    ):
        from embedport.runtimes import bulk

        (tmp_path / "in.txt").write_text("tea\n")
        command = ("encode", folders / "embedding", "--input", tmp_path / "in.txt")
        command += ("-o", f"{tmp_path}/vectors/")
        with monkeypatch.context() as changes:
            changes.setattr(bulk, "encode_shard", mock.Mock(side_effect=KeyboardInterrupt))
            code, _, err = run(*command)
        assert (code, err) == (130, "embedport: interrupted\n")
        [line] = caplog.messages
        assert line.endswith("finished: the same command goes on from there")
        assert run(*command)[0] == 0

    def test_a_file_is_not_replaced_unasked(self, run, folders, tmp_path, monkeypatch):
        (tmp_path / "out.npy").write_text("vectors of another day")
        command = ("encode", folders / "embedding", "text", "-o", tmp_path / "out.npy")
        with monkeypatch.context() as patch:
            patch.setattr("embedport.runtimes.load", lambda *_, **__: pytest.fail("it is late"))
            code, _, err = run(*command)
        assert code == 2
        assert "out.npy exists; choose another place or replace it with --force" in err
        assert (tmp_path / "out.npy").read_text() == "vectors of another day"
        assert run(*command, "--force")[0] == 0
        assert np.load(tmp_path / "out.npy").shape == (1, 64)
        code, _, err = run("encode", folders / "embedding", "text", "--force")
        assert (code, "--force replaces an output: give --output" in err) == (2, True)

    def test_a_file_in_a_folders_place(self, run, folders, tmp_path, monkeypatch):
        """Without a suffix it would be a folder of shards."""
        (tmp_path / "in.txt").write_text("one")
        (tmp_path / "vectors").write_text("of another day")
        monkeypatch.setattr("embedport.runtimes.bulk.survey", lambda *_, **__: pytest.fail("late"))
        files = ("--input", tmp_path / "in.txt", "-o", tmp_path / "vectors", "--force")
        code, _, err = run("encode", folders / "embedding", *files)
        assert code == 2
        assert "vectors is a file, and shards go into a folder: choose another name" in err
        assert (tmp_path / "vectors").read_text() == "of another day"

    def test_a_store_that_is_not_there(self, run, folders, tmp_path, monkeypatch):
        def fail(self):
            raise OSError("AWS Error NETWORK_CONNECTION")

        monkeypatch.setattr("embedport.storage.ObjectPath.exists", fail)
        out = f"file://{tmp_path}/out.npy"
        code, _, err = run("encode", folders / "embedding", "text", "-o", out)
        assert (code, err) == (
            2,
            f"embedport: {out} cannot be written: AWS Error NETWORK_CONNECTION\n",
        )

    @pytest.mark.parametrize(
        "command",
        [("encode", "o/n", "a"), ("rerank", "o/n", "q", "a"), ("check", "o/n")],
        ids=lambda command: command[0],
    )
    def test_a_hub_id_is_no_path(self, run, monkeypatch, command):
        """Windows would make its slash a backslash."""

        def opened(model, **_options):
            raise InputError(repr(model))

        for name in ("load", "check"):
            monkeypatch.setattr(f"embedport.runtimes.{name}", opened)
        assert run(*command) == (2, "", "embedport: 'o/n'\n")

    def test_standard_input(self, run, folders):
        piped = "\n".join(TEXTS) + "\n"
        for more in ((), ("--input", "-")):
            code, out, _ = run("encode", folders / "embedding", *more, stdin=piped)
            assert code == 0
            assert [row["text"] for row in json_lines(out)] == TEXTS

    @pytest.mark.parametrize("verb", [("encode", "embedding"), ("rerank", "reranker", "query")])
    def test_standard_input_without_texts(self, run, folders, tmp_path, verb):
        """The command before the pipe failed, as a rule."""
        name, task, *query = verb
        out = ("-o", tmp_path / "out.jsonl")
        for stdin in ("", " \n\n"):
            code, _, err = run(name, folders / task, *query, *out, stdin=stdin)
            assert (code, err) == (2, "embedport: standard input holds no text\n")
        assert list(tmp_path.iterdir()) == []

    def test_a_file_of_windows(self, run, folders, tmp_path):
        mark = b"\xef\xbb\xbf"
        (tmp_path / "in.txt").write_bytes(mark + b"one\r\n \r\ntwo\r\n")
        (tmp_path / "IN.JSONL").write_bytes(mark + b'{"text": "one"}\r\n{"text": "two"}\r\n')
        for name in ("in.txt", "IN.JSONL"):
            _, out, _ = run("encode", folders / "embedding", "--input", tmp_path / name)
            assert [row["text"] for row in json_lines(out)] == ["one", "two"]
            code, _, _ = run(
                *("encode", folders / "embedding", "--input", tmp_path / name),
                *("-o", tmp_path / name.partition(".")[0]),
            )
            assert code == 0
            index = json.loads((tmp_path / name.partition(".")[0] / "index.json").read_text())
            assert index["rows"] == 2
        _, out, _ = run("encode", folders / "embedding", stdin="\ufeffone\n \ntwo\n")
        assert [row["text"] for row in json_lines(out)] == ["one", "two"]

    def test_a_file_of_another_kind(self, run, folders, tmp_path):
        path = tmp_path / "in.ndjson"
        path.write_text('{"text": "one"}\n')
        for more in ((), ("-o", tmp_path / "vectors")):
            code, _, err = run("encode", folders / "embedding", "--input", path, *more)
            assert code == 2
            assert "or .jsonl" in err

    def test_ranges_alone(self, run, folders, checkpoints, copied, tmp_path):
        """Whatever standard input is."""
        (tmp_path / "sample.txt").write_text("one\ntwo\n")
        folder = copied(folders / "embedding")
        for stdin in ("", "not to be read\n"):
            code, out, err = run(
                "encode", folder, "--calibrate", tmp_path / "sample.txt", stdin=stdin
            )
            assert (code, out) == (0, "")
            assert "ranges measured with" in err
        for more in (("-o", tmp_path / "out.npy"), ("--json",)):
            code, _, err = run("encode", folder, "--calibrate", tmp_path / "sample.txt", *more)
            assert (code, "there are no vectors for -o or --json" in err) == (2, True)
        code, _, err = run("encode", checkpoints(), "--calibrate", tmp_path / "sample.txt")
        assert code == 2
        assert "has no manifest to keep ranges in" in err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--dim", 20, "--precision", "int8"), "int8 needs each value's range at 20 dim"),
            (("--dim", 999), "dim should be from 1 to"),
            (("--precision", "int7"), "precision should be one of"),
        ],
    )
    def test_nothing_is_measured_for_vectors_that_cannot_be(
        self, run, folders, copied, tmp_path, options, message
    ):
        (tmp_path / "sample.txt").write_text("one\ntwo\n")
        folder = copied(folders / "embedding")
        before = (folder / "embedport.json").read_bytes()
        for texts in ((), ("a text",)):
            code, _, err = run(
                "encode", folder, *texts, "--calibrate", tmp_path / "sample.txt", *options
            )
            assert code == 2
            assert message in err
        assert (folder / "embedport.json").read_bytes() == before

    def test_instruction(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", "noise", "--instruction", "Find it")
        literal = run("encode", folders / "embedding", "Instruct: Find it\nQuery:noise")[1]
        assert code == 0
        assert json_lines(out)[0]["embedding"] == json_lines(literal)[0]["embedding"]

        again = run(
            "encode",
            folders / "embedding",
            "noise",
            "--instruction",
            "Find it",
            "--prompt",
            "query",
        )[1]
        assert again == out

    def test_terminal(self, run, folders):
        code, out, _ = run("encode", folders / "embedding", *TEXTS, terminal=True)
        assert code == 0
        vectors = embedport.load(folders / "embedding").encode(TEXTS)  # ty: ignore
        for i, text in enumerate(TEXTS):
            values = " ".join(f"{value:+.3f}" for value in vectors[i, :4])
            line = next(line.split("  ") for line in out.splitlines() if values in line)
            assert text.startswith(line[2].strip().rstrip("…")), line
        cosines = " ".join(f"{value:.2f}" for value in vectors @ vectors[2])
        assert f"2 {cosines}" in [" ".join(line.split()) for line in out.splitlines()]
        assert max(map(len, out.splitlines())) <= 60

    def test_cosines_of_any_length(self, run, folders, monkeypatch):
        """Without a Normalize module vectors have lengths of their own."""
        vectors = np.array([[3, 4], [0, 5]], np.float32)
        monkeypatch.setattr(embedport.Embedder, "encode", lambda *_, **__: vectors)
        out = run("encode", folders / "embedding", "a", "b", terminal=True)[1]
        lines = [" ".join(line.split()) for line in out.splitlines()]
        assert lines[-3:-1] == ["0 1.00 0.80", "1 0.80 1.00"]

    def test_nan_is_null(self, run, folders, monkeypatch):
        def encode(_self, texts, **_options):
            return np.full((len(texts), 2), [np.nan, 0.5], np.float32)

        monkeypatch.setattr(embedport.Embedder, "encode", encode)
        out = run("encode", folders / "embedding", "text")[1]
        assert json.loads(out) == {"text": "text", "embedding": [None, 0.5]}

    def test_truncation_is_said(self, run, folders, tmp_path):
        command = [sys.executable, "-m", "embedport", "encode", str(folders / "embedding")]
        found = subprocess.run(
            [*command, "word " * 99, "--max-length", "8"], capture_output=True, text=True
        )
        assert found.returncode == 0
        assert found.stderr == ("embedport: 1 of 1 texts cut to 8 tokens, the first is text 0\n")


class TestRerank:
    def test_json(self, run, folders):
        code, out, _ = run("rerank", folders / "reranker", "query", *TEXTS, "--top-k", 2)
        rows = json_lines(out)
        assert code == 0
        assert len(rows) == 2
        assert rows[0]["score"] >= rows[1]["score"]
        assert TEXTS[rows[0]["index"]] == rows[0]["document"]

    def test_terminal(self, run, folders):
        documents = ["A long document, longer than a line of sixty columns can be.", "Short."]
        code, out, _ = run("rerank", folders / "reranker", "query", *documents, terminal=True)
        assert code == 0
        rows = [line.split() for line in out.splitlines() if "…" in line or "Short." in line]
        assert [row[0] for row in rows] == ["1", "2"]
        assert float(rows[0][1]) >= float(rows[1][1])
        assert {row[2] for row in rows} == {"0", "1"}

    def test_file(self, run, folders, tmp_path):
        code, out, _ = run(
            *("rerank", folders / "reranker", "query", "-o", tmp_path / "out.jsonl"),
            stdin="one\ntwo\n",
        )
        assert (code, out) == (0, "")
        found = json_lines((tmp_path / "out.jsonl").read_text())
        assert {row["document"] for row in found} == {"one", "two"}
        again = ("rerank", folders / "reranker", "query", "three", "-o", tmp_path / "out.jsonl")
        code, _, err = run(*again)
        assert (code, "out.jsonl exists" in err) == (2, True)
        assert run(*again, "--force")[0] == 0
        assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


class TestCheckpoints:
    """Without an export: plain and quantized checkpoints."""

    @pytest.mark.parametrize("method", [None, "awq"])
    def test_encode(self, run, checkpoints, quantized, method):
        folder = quantized(method) if method else checkpoints("kv8")
        code, out, err = run("encode", folder, "a text", "--device", "cpu", "--json")
        assert (code, err) == (0, "")
        assert len(json.loads(out)["embedding"]) == 128

    def test_rerank(self, run, checkpoints):
        arguments = ("rerank", checkpoints("kv2", "reranker"), "query", "one", "two")
        code, out, err = run(*arguments, "--device", "cpu", "--json")
        assert (code, err) == (0, "")
        assert len(out.splitlines()) == 2

    def test_validate(self, run, checkpoints, tmp_path):
        folder = checkpoints("kv2")
        texts = tmp_path / "texts.txt"
        texts.write_text("tea\nsnow\n")
        code, _, err = run(
            *("validate", folder, "--reference", folder, "--input", texts, "--device", "cpu")
        )
        assert code == 0
        assert "Recorded" not in err
