"""Safetensors files and their index, damaged or hostile."""

import json
import os
import struct

import pytest

from embedport import ModelSpec
from embedport.checkpoint.tensor_files import open_shard, read_headers
from embedport.errors import CheckpointError
from embedport.files import SMALL


def test_fifo(damageable):
    (damageable / "model.safetensors").unlink()
    os.mkfifo(damageable / "model.safetensors")
    with pytest.raises(CheckpointError, match="should be a regular file, found a FIFO"):
        open_shard(damageable / "model.safetensors")


@pytest.mark.parametrize("file", ["b" * 5000, "", "..", "a\0b", "a/b", 7, "é" * 200])
def test_names_in_an_index(damageable, file):
    index = {"weight_map": {"norm.weight": file}}
    (damageable / "model.safetensors.index.json").write_text(json.dumps(index))
    (damageable / "modules.json").unlink()
    (damageable / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"norm\.weight should be in a file beside"):
        ModelSpec.from_checkpoint(damageable)


@pytest.mark.parametrize("names", [None, {}, ["norm.weight"]])
def test_an_index_of_nothing(damageable, names):
    (damageable / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (damageable / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: weight_map should map tensors to sha"):
        read_headers(damageable)


def test_many_tiny_tensors(tmp_path):
    """Only the header's size is read: 1.4 million of them took 24 s and 2.7 GB."""
    tensor = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": tensor for i in range(70_000)}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match=rf"header should have {SMALL:,} bytes at most"):
        open_shard(path)
