"""Pickles: each opens the same folder again."""

import pickle

import numpy as np
import pytest

import embedport
from embedport.errors import InputError


def test_a_pickle_is_the_way_to_open_it(folders):
    embedder = embedport.load_embedder(folders / "embedding", device="cpu", max_length=5)
    embedder.ranges = {"64": [[0.0] * 64, [1.0] * 64]}
    pickled = pickle.dumps(embedder)
    assert len(pickled) < 5000
    again = pickle.loads(pickled)
    assert repr(again) == repr(embedder)
    assert again.ranges == embedder.ranges
    text = "more words than five tokens have room for"
    np.testing.assert_array_equal(again.encode([text]), embedder.encode([text]))


def test_a_pickle_of_a_relative_folder(folders, tmp_path, monkeypatch):
    """A program that changes its own folder would pickle the way to another one."""
    folder = folders / "embedding"
    monkeypatch.chdir(folder.parent)
    embedder = embedport.load(folder.name, device="cpu")
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(embedder)).info.folder == folder


def test_a_pickle_of_a_folder_that_was_replaced(folders, checkpoints, copied):
    """Workers of one pool would give vectors of two models."""
    folder = copied(folders / "embedding")
    pickled = pickle.dumps(embedport.load(folder, device="cpu"))
    embedport.export(checkpoints("kv2"), folder, precision="int8", force=True)
    with pytest.raises(InputError, match="another artifact than when the model was pickled"):
        pickle.loads(pickled)


def test_a_pickled_reranker(folders):
    reranker = embedport.load_reranker(folders / "reranker", device="cpu")
    again = pickle.loads(pickle.dumps(reranker))
    assert again.score([("tea", "a leaf")]) == reranker.score([("tea", "a leaf")])
