"""Files of texts and retrieval sets that are not what they should be."""

import gzip
import io
import json
import os
import zlib
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedport.cli.inputs import read_texts
from embedport.errors import InputError
from embedport.texts import beir as beir_module
from embedport.texts.beir import read_beir
from embedport.texts.samples import read_samples
from embedport.texts.text_files import read_rows, stream_rows, survey


def test_deep_lines(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a"}\n{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
    for read in (read_samples, lambda path: survey(path, 10, 100)):
        with pytest.raises(InputError, match=r"texts\.jsonl:2 .* more than 64 deep"):
            read(path)


def test_an_id_is_a_text_or_a_number(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a", "id": 7}\n{"text": "a", "id": null}\n')
    assert [row.id for row in stream_rows(path)] == ["7", "2"]
    path.write_text('{"text": "a", "_id": null, "id": 7}\n{"text": "a", "_id": 8, "id": 7}\n')
    assert [row.id for row in stream_rows(path)] == ["7", "8"]
    path.write_text('{"text": "a", "id": 7}\n{"text": "a", "id": {"n": 7}}\n')
    with pytest.raises(InputError, match=r"corpus.jsonl:2 .*its id should be a text or a number"):
        survey(path, 10, 100)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a\n\nb\n \nc\n\n\n", "a.txt: 2 of 5 lines are blank"),
        ("\r\na\r\n", "a.txt: 1 of 2 lines are blank"),
        ("a\nb\n\n\n", ""),  # blank lines at the end move nobody's number
        ("a\nb", ""),
    ],
)
def test_blank_lines_among_texts_are_said(tmp_path, caplog, monkeypatch, text, said):
    """They are no texts, so the vectors behind them have other numbers than their lines."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    places = {"a.txt": [read_samples, lambda path: survey(path, 1, 100)]}
    places["standard input"] = [lambda _: read_texts([], None)]
    for place, readers in places.items():
        for read in readers:
            caplog.clear()
            read(path)
            assert bool(said) == bool(caplog.messages)
            assert all(said.replace("a.txt", place) in each for each in caplog.messages)
    path.with_suffix(".jsonl").write_text('{"text": "a"}\n\n{"text": "b"}\n')
    caplog.clear()
    survey(path.with_suffix(".jsonl"), 10, 100)
    assert not caplog.messages


def test_an_empty_prompt_is_one(tmp_path):
    """A model's prompt for documents may be another."""
    rows = [{"text": "a", "prompt": "query"}, {"text": "b", "prompt": ""}, {"text": "c"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for path in (tmp_path / "a.jsonl", tmp_path / "a.parquet"):
        assert [row.prompt for row in stream_rows(path)] == ["query", "", "document"]
        with pytest.raises(InputError, match="names its own prompt"):
            survey(path, 10, 100)


@pytest.mark.parametrize("named", ["query", "document"])
def test_a_text_gets_the_prompt_it_names(tmp_path, named):
    """All texts get one prompt: a row may name it, and no other, not even that of documents."""
    row = {"text": "a", "prompt": named}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    readers = [
        partial(read_rows, tmp_path / "a.jsonl"),
        partial(read_rows, tmp_path / "a.parquet"),
        lambda prompt: read_texts([], tmp_path / "a.jsonl", prompt)[0],
    ]
    for read in readers:
        assert len(read(prompt=named)) == 1
        for other in ("query", "document", None):
            if other != named:
                with pytest.raises(InputError, match=f"names its own prompt, '{named}'"):
                    read(prompt=other)


def test_devices():
    for read in (read_samples, lambda path: survey(path, 10, 100)):
        with pytest.raises(InputError, match=r"/dev/zero cannot be read.*found a device"):
            read(Path("/dev/zero"))


def test_a_line_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("embedport.texts.corpus.LONGEST_LINE", 1000)
    (tmp_path / "a.txt").write_text("short\n" + "a" * 1001)
    with pytest.raises(InputError, match=r"a\.txt:2 should have 1,000 bytes at most"):
        survey(tmp_path / "a.txt", 10, 100)


def test_a_pipe(tmp_path):
    """A shell's <(command) is one."""
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    assert [each.text for each in read_samples(f"/dev/fd/{reading}")] == ["one", "two"]
    os.close(reading)
    reading, writing = os.pipe()
    os.write(writing, b"one\ntwo\n")
    os.close(writing)
    assert read_texts([], f"/dev/fd/{reading}") == (["one", "two"], None)
    os.close(reading)


def test_compressed(small_set, monkeypatch):
    folder = small_set(40, 5)
    plain = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl").unlink()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(plain) + gzip.compress(b""))
    assert read_beir(folder).documents
    monkeypatch.setattr(beir_module, "MOST_TEXT", 100)
    monkeypatch.setattr(beir_module, "read_small", lambda path, limit: path.read_bytes())
    with pytest.raises(InputError, match="100 bytes at most"):
        read_beir(folder)
    (folder / "corpus.jsonl.gz").write_bytes(zlib.compress(plain))
    with pytest.raises(InputError, match="cannot be read"):
        read_beir(folder)
