"""Tokenizer files besides the vocabulary: transformers' tokens, or a refusal."""

import json
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from embedport.checkpoint.spec import ModelSpec
from embedport.errors import CheckpointError
from embedport.texts.prompts import EmbeddingTokenizer
from tests.synthetic import edit

from .conftest import messages

TEXTS = [
    "What is tea?",
    "a <|endoftext|> b",
    "  <|im_end|> x <|im_start|>\n",
    "<unk> <pad> [CLS] <s> <extra>foo<extra> a<think>b</think>c",
    "Ångström\u0301 naïve ﬁ 日本語 12345 \r\n x",
]
EXTRA = "<extra>"
PADDING = {
    **{"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": None},
    **{"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
}
LEFT = {"direction": "Left", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
OBJECT = {"content": "<|im_end|>", "lstrip": False, "normalized": False, "special": True}
# Of transformers' Qwen2Tokenizer, which takes neither from the file.
OWN = r"transformers' Qwen2Tokenizer"
ADDS = "'<extra>', not an added token of tokenizer.json: transformers would add it"


def padded(kind):
    """tokenizer.json names the padding token, and tokenizer_config.json none."""

    def apply(folder):
        edit(folder / "tokenizer_config.json", tokenizer_class=kind, pad_token=None)
        change(folder, lambda found: found.update(padding=PADDING))

    return apply


def model(**values):
    return lambda folder: change(folder, lambda found: found["model"].update(values))


def tokens(name, **flags):
    def apply(found):
        for token in found["added_tokens"]:
            if token["content"] == name:
                token.update(flags)

    return lambda folder: change(folder, apply)


def settings(**values):
    return lambda folder: edit(folder / "tokenizer_config.json", **values)


def another(name, **values):
    return lambda folder: (folder / name).write_text(json.dumps(values))


def decoder(kind="Qwen2Tokenizer", *, without="", more=(), swapped=False, special=None, **values):
    """tokenizer_config.json with the added tokens of tokenizer.json, or with others."""

    def apply(folder):
        found = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        listed = {str(token.pop("id")): token for token in found}
        listed |= {str(9000 + i): found[0] | {"content": name} for i, name in enumerate(more)}
        listed = {id_: token for id_, token in listed.items() if token["content"] != without}
        if swapped:
            listed = dict(zip(listed, reversed(listed.values()), strict=True))
        for token in listed.values():
            token["special"] = token["special"] if special is None else special
        path = folder / "tokenizer_config.json"
        edit(path, added_tokens_decoder=listed, tokenizer_class=kind, **values)

    return apply


def unsorted(found):
    found["added_tokens"].reverse()


def without_end(folder):
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text()) | {"post_processor": None}
    found["added_tokens"] = [x for x in found["added_tokens"] if x["content"] != "<|endoftext|>"]
    path.write_text(json.dumps(found))
    edit(folder / "tokenizer_config.json", eos_token=None, pad_token=None)


def class_in_config(kind, **rules):
    """config.json names the class, and tokenizer_config.json none; rules of tokenizer.json."""

    def apply(folder):
        edit(folder / "tokenizer_config.json", tokenizer_class=None)
        edit(folder / "config.json", tokenizer_class=kind)
        change(folder, lambda found: found.update(rules))

    return apply


def open_tokenizer(folder):
    spec = ModelSpec.from_checkpoint(folder)
    return EmbeddingTokenizer(folder / "tokenizer.json", spec.max_length, spec.inputs)


def change(folder, apply):
    path = folder / "tokenizer.json"
    found = json.loads(path.read_text())
    apply(found)
    path.write_text(json.dumps(found))


COMPUTED = {
    "add_eos_token": settings(add_eos_token=True, add_bos_token=True, bos_token="<|im_start|>"),
    "no post-processor": lambda folder: change(folder, lambda v: v.update(post_processor=None)),
    "split": settings(split_special_tokens=True),
    "left": settings(truncation_side="left", model_max_length=4),
    "max_length": settings(max_length=3, truncation=True, padding_side="left"),
    "no class": settings(tokenizer_class=None),
    "a class in config.json": class_in_config("PreTrainedTokenizerFast", normalizer=None),
    "the file's own": settings(tokenizer_class="PreTrainedTokenizerFast"),
    "another end": settings(eos_token="<|im_end|>"),
    "tokens that are there": another("special_tokens_map.json", eos_token="<|im_end|>"),
    "names of files": settings(vocab_file="/a.json", merges_file="/a.txt", vocab={"a": 0}),
    "max_len": settings(model_max_length=None, max_len=4),
    "a decoder": decoder(),
    "a decoder, special elsewhere": decoder(special=True),
    "a decoder that lacks a token": decoder("TokenizersBackend", without="<think>"),
    "a decoder with other ids": decoder("PreTrainedTokenizerFast", swapped=True),
    "padding": padded("Qwen2Tokenizer"),
    "token types": settings(model_input_names=["input_ids", "token_type_ids", "attention_mask"]),
}
REFUSED = {
    "image_token": (settings(image_token=EXTRA), f"image_token names {ADDS}"),
    "a list": (settings(extra_special_tokens=[EXTRA]), f"extra_special_tokens names {ADDS}"),
    "an object": (settings(extra_special_tokens={"a": EXTRA}), ADDS),
    "model_specific": (settings(model_specific_special_tokens={"a": EXTRA}), ADDS),
    "special_tokens_map": (another("special_tokens_map.json", unk_token=EXTRA), ADDS),
    "more than tokens": (
        another("special_tokens_map.json", add_bos_token=True),
        "add_bos_token is True, and only tokens may stand here",
    ),
    "truncation": (
        lambda folder: change(folder, lambda v: v.update(truncation=LEFT)),
        "truncation has the direction 'left', and tokenizer_config.json names no truncation_side",
    ),
    "padding": (
        padded("PreTrainedTokenizerFast"),
        "padding has the pad_token '<pad>', and tokenizer_config.json names none",
    ),
    "added_tokens": (another("added_tokens.json", **{EXTRA: 5000}), ADDS),
    "split": (settings(split_special_tokens="no"), "split_special_tokens should be true or false"),
    "side": (settings(truncation_side="both"), "truncation_side should be 'left' or 'right'"),
    "no end token": (
        without_end,
        rf"'<\|endoftext\|>' is not an added token, and {OWN} would add it",
    ),
    "add_prefix_space": (settings(add_prefix_space=True), "add_prefix_space is true"),
    "lstrip": (tokens("<|im_end|>", lstrip=True), f"lstrip of the added token .* {OWN} makes it"),
    "rstrip": (tokens("<|endoftext|>", rstrip=True), "rstrip of the added token"),
    "dropout": (model(dropout=0.5), "the model has a dropout of 0.5"),
    "end_of_word_suffix": (model(end_of_word_suffix="e"), f"end_of_word_suffix is 'e'.*{OWN}"),
    "ignore_merges": (model(ignore_merges=True), f"ignore_merges is True.*{OWN}"),
    "a decoder that lacks a token": (
        decoder(without="<think>"),
        "added_tokens_decoder lacks '<think>', an added token of tokenizer.json",
    ),
    "a decoder with a token more": (decoder(more=[EXTRA]), f"added_tokens_decoder names {ADDS}"),
    "a decoder with other ids": (decoder(swapped=True), "gives '</think>' the id '"),
    "other ids": (
        another("added_tokens.json", **{"<think>": 7}),
        r"added_tokens.json: it gives '<think>' the id 7, and tokenizer.json",
    ),
    "split, special elsewhere": (
        decoder(special=True, split_special_tokens=True),
        "added_tokens_decoder says that special of '<think>' is True",
    ),
    "split, special by its name": (
        settings(
            tokenizer_class="TokenizersBackend",
            split_special_tokens=True,
            extra_special_tokens={"image_token": "<think>"},
        ),
        "special of the added token '<think>' is False, and as image_token transformers makes it T",
    ),
    "unsorted": (
        lambda folder: change(folder, unsorted),
        "added_tokens should be in the order of their ids",
    ),
    "no mask": (settings(model_input_names=["input_ids"]), "without attention_mask"),
    "another file": (
        settings(tokenizer_file="/other.json"),
        "tokenizer_file names '/other.json', which transformers before 5.13 opens",
    ),
    "several files": (
        settings(fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"]),
        "of which transformers chooses by its version",
    ),
    "a class in config.json": (
        class_in_config("GPT2Tokenizer"),
        r"/config\.json: tokenizer_class should be one of Qwen2Tokenizer.*found 'GPT2Tokenizer'",
    ),
    "no pre-tokenizer": (
        lambda folder: change(folder, lambda found: found.update(pre_tokenizer=None)),
        f"pre_tokenizer is None, but that of {OWN} is",
    ),
    "another kind": (
        model(type="WordLevel", vocab={"a": 0, "b": 1}, unk_token="a"),
        f"type is 'WordLevel'.*{OWN}",
    ),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_as_transformers(descend, case):
    folder = descend()
    COMPUTED[case](folder)
    spec = ModelSpec.from_checkpoint(folder)
    tokenizer = EmbeddingTokenizer(folder / "tokenizer.json", spec.max_length, spec.inputs)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    longest = min(theirs.model_max_length, spec.max_position_embeddings)
    for text, ids in zip(TEXTS, tokenizer.encode(TEXTS).ids, strict=True):
        expected = theirs(text, truncation=True, max_length=longest)["input_ids"]
        np.testing.assert_array_equal(ids, expected)


# Where a chat template's variables come from.
VARIABLES = {
    "the class": settings(eos_token=None, pad_token=None),
    "none": settings(eos_token=None, pad_token=None, tokenizer_class="PreTrainedTokenizerFast"),
    "the map": another("special_tokens_map.json", cls_token="<|im_end|>", eos_token="<|im_start|>"),
    "tokens as objects": settings(
        eos_token={"__type": "AddedToken", **OBJECT}, pad_token=None, add_eos_token=True
    ),
    "a map of objects": another("special_tokens_map.json", cls_token=OBJECT, eos_token=OBJECT),
    "a key": settings(image_token="<|im_end|>"),
    "an object": settings(extra_special_tokens={"image_token": "<|im_end|>"}),
}


@pytest.mark.parametrize("case", VARIABLES)
def test_variables_of_a_template(descend, case):
    folder = descend()
    VARIABLES[case](folder)
    names = ["eos_token", "pad_token", "unk_token", "cls_token", "image_token", "add_eos_token"]
    names += ["content"]
    chat = "{{ messages[0].content }}" + "".join(f"|{{{{ {name} }}}}" for name in names)
    (folder / "chat_template.jinja").write_text(chat)
    edit(folder / "sentence_bert_config.json", **messages("feature-extraction", "auto"))
    tokenizer = open_tokenizer(folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "tea"}]
    expected = theirs.apply_chat_template(chat, return_dict=True)["input_ids"]
    np.testing.assert_array_equal(tokenizer.encode(["tea"]).ids[0], expected)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(descend, case):
    folder = descend()
    apply, message = REFUSED[case]
    apply(folder)
    with pytest.raises(CheckpointError, match=message):
        open_tokenizer(folder)


# Refused because transformers would give other tokens than tokenizer.json does.
OTHER_TOKENS = (
    "a decoder that lacks a token",
    "a decoder with a token more",
    "a decoder with other ids",
    "a class in config.json",
    "other ids",
    "padding",
    "split, special elsewhere",
    "unsorted",
)


@pytest.mark.parametrize("case", OTHER_TOKENS)
def test_refused_for_transformers_tokens(descend, case):
    folder = descend()
    REFUSED[case][0](folder)
    theirs: Any = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours.encode_special_tokens = theirs.split_special_tokens
    assert [theirs(text)["input_ids"] for text in TEXTS] != [
        ours.encode(text).ids for text in TEXTS
    ]
