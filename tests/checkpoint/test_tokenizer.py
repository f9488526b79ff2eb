"""Tokenizers that end the tokenizers library, or are not for the model: errors of ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

import embedport
from embedport import ModelSpec
from embedport.checkpoint.tokenizer import MOST_IDS, load_tokenizer
from embedport.checkpoint.weights import Weights
from embedport.errors import CheckpointError
from embedport.integrity import cache_folder
from embedport.texts.prompts import EmbeddingTokenizer
from tests.synthetic import append_end_of_text
from tests.tokenizer_rules import SECOND, TEXT, replace, sequence, split, template


@pytest.fixture
def path(checkpoints, copied):
    return copied(checkpoints()) / "tokenizer.json"


def change(path, **rules):
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | rules))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        # These take gigabytes and end the process, by itself or by the system.
        ({"post_processor": template([1] * 600)}, "should add 1000 ids at most"),
        ({"post_processor": template([1], [TEXT] * 9)}, "the text once"),
        ({"post_processor": [template([1])]}, "should be an object with a type"),
        ({"normalizer": replace({"String": "a"}, "a" * 10, 9)}, "3,000,000,000 times as long"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/w=="}}, "Precompiled"),
        ({"normalizer": ["Replace", {"String": "a"}, "aa"]}, "should be an object with a type"),
        ({"pre_tokenizer": sequence("pretokenizers", {"type": "ByteLevel"}, 40)}, "as long"),
        ({"post_processor": template([2**32 - 1])}, f"from 0 to {MOST_IDS - 1:,}"),
        ({"decoder": {"type": "Strip", "content": "a" * 70_000}}, "65,536 bytes at most"),
        ({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}, "found 'Unigram'"),
        ({"model": None}, "an object with a model"),
        ({"added_tokens": {"a": 1}}, "added_tokens should be a list of objects"),
        ({"added_tokens": ["a"]}, "added_tokens should be a list of objects"),
        ({"added_tokens": [{"id": 1, "content": "a" * (1 << 20)}, {"id": 2, "content": "b"}]},
         "added tokens should have 1,048,576 characters at most"),
        ({"post_processor": template([1]) | {"single": None}}, "should have a list single"),
        ({"post_processor": template([1]) | {"special_tokens": {"a": 1}}}, "have a list of ids"),
        ({"normalizer": {"type": "Sequence", "normalizers": {"type": "NFC"}}}, "should be a list"),
        # These are panics of its, in Rust, which no `except Exception` sees.
        ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "chunk size must be non-zero"),
        ({"post_processor": template([1]) | {"special_tokens": {}}}, "no entry found"),
        ({"post_processor": template([1], [SECOND])}, "index out of bounds"),
    ],
)  # fmt: skip
def test_rules(path, rules, message):
    change(path, **rules)
    with pytest.raises(CheckpointError, match=rf"tokenizer\.json is not a tokenizer.*({message})"):
        load_tokenizer(path)


@pytest.mark.parametrize("token", [-1, 1.5, "1", True, MOST_IDS, 2**31, 2**32 - 1])
def test_ids(path, token):
    values = json.loads(path.read_text())
    values["model"]["vocab"]["zzzq"] = token
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="an id of the vocabulary should be from 0 to"):
        load_tokenizer(path)
    values["model"]["vocab"]["zzzq"] = 9
    values["added_tokens"].append(values["added_tokens"][0] | {"id": token, "content": "q"})
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="an added token's id should be from 0 to"):
        load_tokenizer(path)


def test_the_largest_id_that_is_taken_can_be_written(path):
    values = json.loads(path.read_text())
    values["model"]["vocab"]["zzzq"] = MOST_IDS - 1
    path.write_text(json.dumps(values))
    written = Tokenizer.from_str(load_tokenizer(path).to_str())
    assert written.token_to_id("zzzq") == MOST_IDS - 1


def test_a_panic_at_a_text(path):
    """The library gives up on a text for which a pattern takes forever."""
    change(path, pre_tokenizer=split("(a|aa)+$"))
    # Qwen's own class has a pattern of its own.
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = EmbeddingTokenizer(path, 100)
    with pytest.raises(CheckpointError, match=r"not a tokenizer that works: .*retry-limit"):
        tokenizer.encode(["a" * 60 + "b"])


def test_what_was_checked_is_remembered(path, monkeypatch):
    """By its content: a copy is the same, a changed file is checked again."""
    load_tokenizer(path)
    assert len(list(cache_folder("tokenizers").iterdir())) >= 1
    monkeypatch.setattr(
        "embedport.checkpoint.tokenizer.check_structure", lambda values: pytest.fail("again")
    )
    load_tokenizer(path)
    change(path, decoder=None)
    with pytest.raises(pytest.fail.Exception):
        load_tokenizer(path)


def test_no_cache(path, monkeypatch, tmp_path):
    """A file in the folder's place; then a user without a home."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load_tokenizer(path).encode("a").ids
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda name: name)
    with pytest.raises(RuntimeError, match="home"):
        Path.home()
    assert load_tokenizer(path).encode("a").ids


def test_a_cache_that_may_not_be_looked_at(path, monkeypatch):
    """As under another user's home, in a container. The user of these tests may look anywhere."""
    folder, exists = cache_folder("tokenizers"), Path.exists

    def refused(asked):
        if asked.parent == folder:
            raise PermissionError(13, "Permission denied")
        return exists(asked)

    monkeypatch.setattr(Path, "exists", refused)
    assert load_tokenizer(path).encode("a").ids


def test_the_real_one(tmp_path, real_tokenizer):
    """It is within all bounds, also with the template that ends texts."""
    path = tmp_path / "tokenizer.json"
    for tokenizer in (real_tokenizer, Tokenizer.from_str(real_tokenizer.to_str())):
        append_end_of_text(tokenizer, path)
        tokenizer.save(str(path))
        found = load_tokenizer(path)
        assert found.encode("naïve 日本").ids == tokenizer.encode("naïve 日本").ids


def test_ids_beyond_the_table(checkpoints, copied, tmp_path):
    """Ids that the tokenizer puts around every text need a row."""
    folder = copied(checkpoints())
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    change(folder / "tokenizer.json", post_processor=template([rows]))
    for run in (lambda: embedport.load(folder), lambda: embedport.export(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=rf"should be below {rows}.*found token {rows}"):
            run()
    assert not (tmp_path / "out").exists()
    change(folder / "tokenizer.json", post_processor=template([rows - 1]))
    model = embedport.load(folder, device="cpu")
    assert isinstance(model, embedport.Embedder)
    assert np.isfinite(model.encode(["a"])).all()


def test_answers_beyond_the_table(checkpoints):
    weights = Weights(ModelSpec.from_checkpoint(checkpoints(task="reranker")))
    rows = weights.spec.vocab_size
    for yes, no in ((rows, 2), (2, rows)):
        with pytest.raises(CheckpointError, match=f"rows for the answer tokens {yes} and {no}"):
            weights.answer_row(yes, no)
