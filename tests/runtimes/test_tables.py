"""Texts from Parquet and vectors into Parquet and Arrow, on disk and in an object store."""

import json
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import feather, parquet

from embedport.errors import InputError
from embedport.runtimes import bulk
from embedport.runtimes.bulk import Job, encode_corpus, run_here
from embedport.storage import ObjectPath, as_place

TEXTS = ["one", "two words", "long " * 90, " spaces ", "日本語 🥾", "", "one"] * 5
IDS = [f"doc-{i}" for i in range(len(TEXTS))]


@pytest.fixture(scope="module")
def expected(embedder):
    return embedder.encode(TEXTS)


@pytest.fixture
def job(embedder, tmp_path, monkeypatch):
    """A job over a Parquet file with row groups of ten, in shards of four."""
    monkeypatch.setattr(bulk, "SHARD_ROWS", 4)
    path = tmp_path / "corpus.parquet"
    parquet.write_table(pa.table({"_id": IDS, "other": TEXTS, "text": TEXTS}), path, 10)
    return Job(str(embedder.info.folder), path, tmp_path / "vectors", format="parquet")


def check(table, expected, *, with_text):
    assert table.schema.field("vector").type == pa.list_(pa.float32(), expected.shape[1])
    assert table.column_names == ["id", *["text"] * with_text, "vector"]
    assert table["id"].to_pylist() == IDS
    if with_text:
        assert table["text"].to_pylist() == TEXTS
    vectors = np.stack(table["vector"].to_numpy())
    np.testing.assert_allclose(vectors, expected, atol=2e-6)


class TestCorpora:
    @pytest.mark.parametrize("with_text", [False, True])
    def test_parquet_to_parquet(self, job, expected, with_text):
        index = encode_corpus(replace(job, with_text=with_text), run_here)
        # Row groups of 10, 10, 10 and 5 texts.
        assert [part.rows for part in index.shards] == [4, 4, 2, 4, 4, 2, 4, 4, 2, 4, 1]
        check(
            parquet.read_table(sorted(job.output.glob("*.parquet"))), expected, with_text=with_text
        )

    def test_parquet_to_npy(self, job, expected):
        encode_corpus(replace(job, format="npy"), run_here)
        vectors = np.concatenate([np.load(path) for path in sorted(job.output.glob("*.npy"))])
        np.testing.assert_allclose(vectors, expected, atol=2e-6)

    def test_a_damaged_shard_is_done_again(self, job, expected):
        encode_corpus(job, run_here)
        shards = sorted(job.output.glob("*.parquet"))
        shards[0].write_bytes(shards[0].read_bytes()[:-10])
        parquet.write_table(parquet.read_table(shards[1]).slice(1), shards[1])
        before = {path: path.stat().st_mtime_ns for path in shards[2:]}
        encode_corpus(job, run_here)
        check(parquet.read_table(shards), expected, with_text=False)
        assert {path: path.stat().st_mtime_ns for path in shards[2:]} == before

    def test_another_format_is_another_job(self, job, monkeypatch):
        encode_corpus(job, run_here)
        with pytest.raises(InputError, match="whose with_text was False, and is True now"):
            encode_corpus(replace(job, with_text=True), run_here)
        with monkeypatch.context() as patch:
            patch.setattr(bulk, "SHARD_ROWS", 3)
            with pytest.raises(InputError, match="whose shards was another; choose"):
                encode_corpus(job, run_here)
        with pytest.raises(InputError, match="whose format was 'parquet', and is 'npy' now"):
            encode_corpus(replace(job, format="npy"), run_here)

    @pytest.mark.parametrize(
        ("columns", "message"),
        [
            ({"body": ["a"]}, 'a column "text", found body'),
            ({"text": ["a", None]}, "row 1 should have a text"),
            ({"text": [1]}, "row 0 should have a text"),
            ({"text": ["a"], "title": [1]}, "row 0 .*: its title should be a text, found 1"),
            ({"text": ["a"], "id": [b"a"]}, "row 0: its id should be a text or a number, found b"),
            ({"text": ["a"], "prompt": ["query"]}, "row 0 names its own prompt"),
            ({"text": pa.array([], pa.string())}, "holds no text"),
        ],
    )
    def test_bad_rows_before_any_work(self, job, columns, message):
        parquet.write_table(pa.table(columns), job.input)
        with pytest.raises(InputError, match=message):
            encode_corpus(job, run_here)
        assert not job.output.exists()

    def test_a_column_twice(self, job):
        columns = [pa.array(["a"]), pa.array(["b"])]
        parquet.write_table(pa.table(columns, names=["text", "text"]), job.input)
        with pytest.raises(InputError, match='should have one column "text", found 2'):
            encode_corpus(job, run_here)

    def test_a_damaged_file(self, job):
        job.input.write_bytes(b"PAR1 and nothing else")
        with pytest.raises(InputError, match="cannot be read as Parquet"):
            encode_corpus(job, run_here)

    def test_an_input_that_changes_meanwhile(self, job):
        def run(*arguments):
            parquet.write_table(pa.table({"text": TEXTS[::-1]}), job.input, 10)
            run_here(*arguments)

        with pytest.raises(InputError, match="the file has changed"):
            encode_corpus(job, run)


class TestObjectStores:
    """pyarrow's local filesystem stands for a store: it has the same interface."""

    @pytest.mark.parametrize("form", ["npy", "parquet"])
    def test_a_job_goes_on(self, job, expected, tmp_path, form):
        lines = [json.dumps({"text": text}) for text in TEXTS]
        (tmp_path / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
        output = tmp_path / "vectors"
        output.mkdir()
        remote = replace(
            job,
            input=as_place(f"file://{tmp_path}/corpus.jsonl"),
            output=as_place(f"file://{tmp_path}/vectors/"),
            format=form,
        )
        encode_corpus(remote, run_here)
        shards = sorted(output.glob(f"*.{form}"))
        assert len(shards) == 9
        shards[3].unlink()
        shards[5].write_bytes(b"")
        kept = {path: path.stat().st_mtime_ns for path in shards if path not in shards[3:6:2]}
        assert encode_corpus(remote, run_here).complete
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
        if form == "npy":
            vectors = np.concatenate([np.load(path) for path in shards])
        else:
            vectors = np.stack(parquet.read_table(shards)["vector"].to_numpy())
        np.testing.assert_allclose(vectors, expected, atol=2e-6)
        with pytest.raises(InputError, match="vectors of another job, whose dim"):
            encode_corpus(replace(remote, dim=16), run_here)
        encode_corpus(replace(remote, dim=16), run_here, force=True)
        assert json.loads((output / "index.json").read_text())["dim"] == 16

    def test_what_is_not_there(self, job, tmp_path):
        with pytest.raises(InputError, match=r"s3x://bucket/a.jsonl cannot be opened"):
            as_place("s3x://bucket/a.jsonl")
        missing = as_place(f"file://{tmp_path}/none.jsonl")
        with pytest.raises(InputError, match=r"none.jsonl cannot be read"):
            encode_corpus(replace(job, input=missing), run_here)

    def test_paths(self):
        path = ObjectPath("s3://bucket/a/?region=eu") / "b.npy"
        assert (str(path), path.name, path.suffix) == ("s3://bucket/a/b.npy", "b.npy", ".npy")


class TestFiles:
    @pytest.mark.parametrize("with_text", [False, True])
    @pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
    def test_one_file(self, job, expected, tmp_path, monkeypatch, suffix, with_text):
        out = tmp_path / f"vectors{suffix}"
        self.run(monkeypatch, job, "-o", out, *["--with-text"] * with_text)
        read = parquet.read_table if suffix == ".parquet" else feather.read_table
        check(read(out), expected, with_text=with_text)

    def test_integers(self, job, embedder, tmp_path, monkeypatch):
        self.run(monkeypatch, job, "-o", tmp_path / "v.parquet", "--precision", "binary")
        table = parquet.read_table(tmp_path / "v.parquet")
        assert table.schema.field("vector").type == pa.list_(pa.int8(), 8)
        expected = embedder.encode(TEXTS, precision="binary")
        np.testing.assert_array_equal(np.stack(table["vector"].to_numpy()), expected)

    def test_numbers_are_ids_of_texts_without(self, job, tmp_path, monkeypatch):
        (tmp_path / "texts.txt").write_text("one\n\ntwo\n")
        job = replace(job, input=tmp_path / "texts.txt")
        self.run(monkeypatch, job, "-o", tmp_path / "v.arrow")
        assert feather.read_table(tmp_path / "v.arrow")["id"].to_pylist() == ["0", "1"]

    @staticmethod
    def run(monkeypatch, job, *arguments):
        from embedport.cli import main

        command = ["embedport", "encode", job.model, "--input", job.input, *arguments]
        monkeypatch.setattr(sys, "argv", [str(part) for part in command])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
