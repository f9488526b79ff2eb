"""Small files that are not small, not files, or not what they should be."""

import gzip
import json
import os
import socket
import struct
import tempfile
import zlib
from pathlib import Path

import pytest

from embedport import ModelSpec
from embedport.checkpoint.hub import fetch
from embedport.checkpoint.tensor_files import open_shard
from embedport.errors import CheckpointError, InputError
from embedport.files import SMALL, read_small
from embedport.links import check_links
from embedport.strict_json import MOST_VALUES, load_json, parse_json
from embedport.texts import beir as beir_module
from embedport.texts.beir import read_beir
from embedport.texts.corpus import survey
from embedport.texts.samples import read_samples


@pytest.fixture
def folder(checkpoints, copied):
    return copied(checkpoints())


class TestKinds:
    """Only regular files are read; a FIFO without a writer would be waited for."""

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "modules.json"])
    def test_fifo(self, folder, name):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CheckpointError, match=rf"{name}.*regular file, found a FIFO"):
            ModelSpec.from_checkpoint(folder)

    def test_device(self, folder):
        (folder / "config.json").unlink()
        (folder / "config.json").symlink_to("/dev/urandom")
        with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a device"):
            ModelSpec.from_checkpoint(folder)

    def test_folder(self, folder):
        (folder / "config.json").unlink()
        (folder / "config.json").mkdir()
        with pytest.raises(CheckpointError, match=r"config\.json.*regular file, found a folder"):
            ModelSpec.from_checkpoint(folder)

    def test_socket(self):
        with tempfile.TemporaryDirectory() as base, socket.socket(socket.AF_UNIX) as made:
            made.bind(f"{base}/s")  # a path of 107 bytes at most
            with pytest.raises(ValueError, match="found a socket"):
                read_small(Path(base) / "s")

    def test_shard(self, folder):
        (folder / "model.safetensors").unlink()
        os.mkfifo(folder / "model.safetensors")
        with pytest.raises(CheckpointError, match="should be a regular file, found a FIFO"):
            open_shard(folder / "model.safetensors")

    @pytest.mark.parametrize("target", ["modules.json", "nowhere"])
    def test_link_to_nothing(self, folder, target):
        """Taken for absent, it would be another model's pooling."""
        (folder / "modules.json").unlink()
        (folder / "modules.json").symlink_to(target)
        for look in (fetch, check_links):
            with pytest.raises(InputError, match=r"modules\.json is a link to .* leads to no file"):
                look(folder)


class TestSizes:
    def test_large_file(self, folder):
        with (folder / "config.json").open("r+b") as file:
            file.truncate(4 << 30)  # takes no room
        with pytest.raises(CheckpointError, match=rf"{SMALL:,} bytes at most, found 4,294,967,296"):
            ModelSpec.from_checkpoint(folder)

    def test_depth(self):
        assert parse_json("[" * 60 + "]" * 60)
        for text in ("[" * 70 + "]" * 70, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 100_000):
            with pytest.raises(ValueError, match="more than 64 deep"):
                parse_json(text)

    @pytest.mark.parametrize("digits", ["9" * 101, "9" * 10_000, "0." + "1" * 1000])
    def test_digits(self, digits):
        with pytest.raises(ValueError, match="100 digits at most"):
            parse_json(f'{{"a": {digits}}}')
        assert parse_json("1000000000000000019884624838656") == int(1e30)

    def test_values(self):
        with pytest.raises(ValueError, match=f"{MOST_VALUES:,} values at most"):
            parse_json("[" + "1," * MOST_VALUES + "1]")

    def test_lone_surrogate(self):
        assert parse_json('"\\ud83d\\ude00"') == "😀"
        with pytest.raises(ValueError, match=r"lone surrogate U\+D83D"):
            parse_json('"\\ud83d"')

    def test_bytes(self, tmp_path):
        """A mark at the beginning and other encodings are refused, as ever."""
        for data in (b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"\xff{}"):
            (tmp_path / "a.json").write_bytes(data)
            with pytest.raises(ValueError, match=r"BOM|decode"):
                load_json(tmp_path / "a.json")

    @pytest.mark.parametrize("file", ["b" * 5000, "", "..", "a\0b", "a/b", 7, "é" * 200])
    def test_names_in_an_index(self, folder, file):
        index = {"weight_map": {"norm.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "modules.json").unlink()
        (folder / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"norm\.weight should be in a file beside"):
            ModelSpec.from_checkpoint(folder)

    def test_many_tiny_tensors(self, tmp_path):
        """Only the header's size is read: 1.4 million of them took 24 s and 2.7 GB."""
        tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.dumps({f"t{i}": tensor for i in range(70_000)}).encode()
        path = tmp_path / "model.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header)
        with pytest.raises(CheckpointError, match=rf"header should have {SMALL:,} bytes at most"):
            open_shard(path)

    def test_a_folder_that_cannot_be_one(self):
        with pytest.raises(InputError, match="cannot be a folder: File name too long"):
            fetch("a" * 5000)
        with pytest.raises(InputError, match="no such folder"):
            fetch("a\0b")


class TestTexts:
    def test_deep_lines(self, tmp_path):
        path = tmp_path / "texts.jsonl"
        path.write_text('{"text": "a"}\n{"text": ' + "[" * 5000 + "]" * 5000 + "}\n")
        for read in (read_samples, lambda path: survey(path, 10, 100)):
            with pytest.raises(InputError, match=r"texts\.jsonl:2 .* more than 64 deep"):
                read(path)

    def test_devices(self):
        for read in (read_samples, lambda path: survey(path, 10, 100)):
            with pytest.raises(InputError, match=r"/dev/zero cannot be read.*found a device"):
                read(Path("/dev/zero"))

    def test_a_line_without_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr("embedport.texts.corpus.LONGEST_LINE", 1000)
        (tmp_path / "a.txt").write_text("short\n" + "a" * 1001)
        with pytest.raises(InputError, match=r"a\.txt:2 should have 1,000 bytes at most"):
            survey(tmp_path / "a.txt", 10, 100)

    def test_a_pipe(self, tmp_path):
        """A shell's <(command) is one."""
        reading, writing = os.pipe()
        os.write(writing, b"one\ntwo\n")
        os.close(writing)
        assert [each.text for each in read_samples(f"/dev/fd/{reading}")] == ["one", "two"]
        os.close(reading)

    def test_compressed(self, small_set, monkeypatch):
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
