"""Prompts, token id by token id against transformers with Qwen3's own tokenizer."""

import numpy as np
import pytest

from embedport.checkpoint.pipeline import Inputs
from embedport.errors import CheckpointError, InputError
from embedport.texts.prompts import (
    DEFAULT_INSTRUCTION,
    END_OF_TEXT,
    EmbeddingTokenizer,
    RerankerTokenizer,
    load_tokenizer,
    query_prompt,
    resolve_prompt,
    token_id,
)
from embedport.texts.samples import builtin_pairs, builtin_samples
from tests.synthetic import TINY, append_end_of_text, write_checkpoint

ODD_TEXTS = [
    "",
    " ",
    "\n\n",
    "naïve café",
    "e\u0301 is normalized to é",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family",
    "<|im_end|> inside a text",
    "a" * 5000,
    "tab\tand\r\nCRLF",
    "\x00 null",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, real_tokenizer):
    """An embedding and a reranker checkpoint with the real tokenizer."""
    from dataclasses import replace

    base = tmp_path_factory.mktemp("real")
    geometry = replace(TINY, vocab_size=151_669, hidden_size=32)
    return {
        task: write_checkpoint(base / task, geometry, task, real_tokenizer)
        for task in ("embedding", "reranker")
    }


@pytest.fixture(scope="module")
def reference(folders):
    from transformers import AutoTokenizer

    return {
        task: AutoTokenizer.from_pretrained(folder, padding_side="left")
        for task, folder in folders.items()
    }


def test_ids_of_the_real_tokenizer(folders):
    path = folders["reranker"] / "tokenizer.json"
    tokenizer = load_tokenizer(path)
    assert token_id(tokenizer, "yes", path) == 9693
    assert token_id(tokenizer, "no", path) == 2152
    assert token_id(tokenizer, END_OF_TEXT, path) == 151643


@pytest.mark.parametrize("max_length", [32768, 100, 17])
def test_embedding_ids(folders, reference, max_length):
    """The model card's code: get_detailed_instruct, then the tokenizer with truncation."""
    tokenizer = EmbeddingTokenizer(folders["embedding"] / "tokenizer.json", max_length)
    texts = [sample.text for sample in builtin_samples()] + ODD_TEXTS
    for prompt in ("", query_prompt(DEFAULT_INSTRUCTION), query_prompt("Find the statute")):
        found = tokenizer.encode(texts, prompt)
        expected = reference["embedding"](
            [prompt + text for text in texts], truncation=True, max_length=max_length
        )["input_ids"]
        for i, ids in enumerate(expected):
            assert found.ids[i].tolist() == ids, texts[i][:40]
            assert ids[-1] == 151643
            assert len(ids) <= max_length
        whole = reference["embedding"]([prompt + text for text in texts])["input_ids"]
        cut = [i for i, ids in enumerate(whole) if len(ids) > max_length]
        assert found.truncated == cut


@pytest.mark.parametrize("max_length", [8192, 120])
def test_reranker_ids(folders, reference, max_length):
    """The model card's code: body truncated alone, between prefix and suffix."""
    hf = reference["reranker"]
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query "
        'and the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
        "<|im_start|>user\n"
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    prefix_ids = hf.encode(prefix, add_special_tokens=False)
    suffix_ids = hf.encode(suffix, add_special_tokens=False)
    pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
    pairs += [("q", text) for text in ODD_TEXTS]
    instruction = "Judge the law"
    bodies = [
        f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
        for query, document in pairs
    ]
    expected = hf(
        bodies,
        padding=False,
        truncation="longest_first",
        return_attention_mask=False,
        max_length=max_length - len(prefix_ids) - len(suffix_ids),
    )["input_ids"]
    tokenizer = RerankerTokenizer(folders["reranker"] / "tokenizer.json", max_length)
    found = tokenizer.encode(pairs, instruction)
    for i, body in enumerate(expected):
        assert found.ids[i].tolist() == prefix_ids + body + suffix_ids
        assert len(found.ids[i]) <= max_length
    assert bool(found.truncated) == (max_length == 120 or any(len(d) > 30000 for _, d in pairs))


def test_reranker_needs_room(folders):
    with pytest.raises(InputError, match="leaves no room"):
        RerankerTokenizer(folders["reranker"] / "tokenizer.json", 40)


def test_a_text_of_40000_tokens(folders):
    tokenizer = EmbeddingTokenizer(folders["embedding"] / "tokenizer.json", 32768)
    found = tokenizer.encode(["word " * 40_000, "short"])
    assert [len(ids) for ids in found.ids] == [32768, 2]
    assert found.truncated == [0]
    assert found.ids[0][-1] == 151643


@pytest.fixture(scope="module")
def tokenizer(folders):
    return EmbeddingTokenizer(folders["embedding"] / "tokenizer.json", 100)


class Table:
    """A loop over it gives the column names, as over pandas' DataFrame."""

    columns = ("title", "text")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    "texts",
    [{"d1": "a text"}, {"a", "text"}, np.array("a text"), Table()],
    ids=["dict", "set", "array", "table"],
)
def test_what_is_read_as_other_items_is_no_list(tokenizer, texts):
    """A loop over a dict gives its keys: the vectors, or the scores, would be theirs."""
    with pytest.raises(InputError, match=f"list of strings, found {type(texts).__name__}"):
        tokenizer.encode(texts)


def test_bad_texts(folders, tokenizer):
    with pytest.raises(InputError, match=r"text 1 is not valid Unicode: lone surrogate U\+D800 at"):
        tokenizer.encode(["fine", "bad \ud800"])
    with pytest.raises(InputError, match="text 0 should be a string, found int"):
        tokenizer.encode([7])
    with pytest.raises(InputError, match="list of strings, found one string"):
        tokenizer.encode("one string")
    with pytest.raises(InputError, match="list of strings, found NoneType"):
        tokenizer.encode(None)
    with pytest.raises(InputError, match="lone surrogate"):
        tokenizer.encode(["fine"], "bad prompt \udcff")
    pairs = RerankerTokenizer(folders["reranker"] / "tokenizer.json", 200)
    for pair in ({"query": "a", "document": "b"}, {"a", "b"}):
        with pytest.raises(InputError, match="pair 0 should be"):
            pairs.encode([pair])  # ty: ignore[invalid-argument-type]
    with pytest.raises(InputError, match="pair 0 should be"):
        pairs.encode(["query only"])  # ty: ignore[invalid-argument-type]
    with pytest.raises(InputError, match="pair 0 should be"):
        pairs.encode([None])  # ty: ignore[invalid-argument-type]
    with pytest.raises(InputError, match="the instruction should be a string, found 7"):
        pairs.encode([("q", "d")], 7)  # ty: ignore[invalid-argument-type]
    with pytest.raises(InputError, match="a prompt should be a string, found 7"):
        resolve_prompt(Inputs(), 7)  # ty: ignore[invalid-argument-type]
    with pytest.raises(InputError, match="lone surrogate"):
        pairs.encode([("q", "\udfff")])
    assert tokenizer.encode([]).ids == []


def test_a_tokenizer_without_an_end_token(folders):
    """Nothing is added that it does not add; Qwen's first tokenizer.json was one."""
    path = folders["reranker"] / "tokenizer.json"
    tokenizer = EmbeddingTokenizer(path, 10)
    assert tokenizer.encode(["a"]).ids[0].tolist() == [64]
    with pytest.raises(InputError, match="input 1 becomes no token"):
        tokenizer.encode(["a", ""])
    raw = load_tokenizer(path)
    assert append_end_of_text(raw, path) == 151643
    assert raw.encode("a").ids == [64, 151643]


def test_a_word_that_is_no_token(folders):
    path = folders["reranker"] / "tokenizer.json"
    with pytest.raises(CheckpointError, match="'no such word' should be a single token"):
        token_id(load_tokenizer(path), "no such word", path)


def test_damaged_tokenizer(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        load_tokenizer(tmp_path / "tokenizer.json")
