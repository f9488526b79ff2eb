"""What a tokenizer's files declare beside its vocabulary, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from .chat import NAMED_TOKENS, TOKENIZER_CONFIG
from .errors import CheckpointError
from .files import read_json
from .keys import shown

# Classes that take tokenizer.json as it is, and those that have a normalizer and a pre-tokenizer of
# their own, which are Qwen's.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# What decides where an added token is found in a text.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_token_settings(folder: Path) -> tuple[bool, Literal["left", "right"]]:
    """(whether special tokens in a text are plain text, the end that is cut) of a tokenizer.

    Raises:
        CheckpointError: tokenizer_config.json asks for what is not supported.
    """
    path = folder / TOKENIZER_CONFIG
    values = read_json(path) if path.exists() else {}
    if values.get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map names code of the checkpoint's own, which is never run"
        )
    kind = values.get("tokenizer_class")
    if kind not in (None, *PLAIN_CLASSES, *QWEN_CLASSES):
        raise CheckpointError(
            f"{path}: tokenizer_class should be one of {', '.join(QWEN_CLASSES + PLAIN_CLASSES)}, "
            f"found {shown(kind)}"
        )
    split = values.get("split_special_tokens", False)
    if split not in (None, True, False):
        raise CheckpointError(
            f"{path}: split_special_tokens should be true or false, found {shown(split)}"
        )
    side = values.get("truncation_side") or "right"
    if side not in ("left", "right"):
        raise CheckpointError(
            f"{path}: truncation_side should be 'left' or 'right', found {shown(side)}"
        )
    return bool(split), side


def read_length(folder: Path, positions: int, declared: int | None) -> int:
    """Tokens after which a text is cut.

    Args:
        folder: The checkpoint's.
        positions: What the model has.
        declared: max_seq_length of sentence-transformers, which comes before the tokenizer's own.

    Raises:
        CheckpointError: It is more than the model has positions.
    """
    if declared is not None:
        if declared > positions:
            raise CheckpointError(
                f"{folder / 'sentence_bert_config.json'}: max_seq_length is {declared}, and the "
                f"model has {positions} positions (max_position_embeddings)"
            )
        return declared
    path = folder / TOKENIZER_CONFIG
    # transformers writes 1e30 for "no limit": any number may stand here.
    value = read_json(path).get("model_max_length") if path.exists() else None
    if isinstance(value, int | float) and value >= 1:
        return int(min(value, positions))
    return positions


def check_as_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer of which transformers would make another than its file says.

    The class Qwen2Tokenizer takes the vocabulary, the merges and the post-processor from
    tokenizer.json, and has normalizer and pre-tokenizer of its own; and every class adds the tokens
    that tokenizer_config.json names.

    Raises:
        CheckpointError: It would.
    """
    path = folder / TOKENIZER_CONFIG
    values = read_json(path) if path.exists() else {}
    if values.get("tokenizer_class") not in PLAIN_CLASSES:
        _check_qwen(tokenizer, folder / "tokenizer.json")
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    known = added.keys()
    for key, name in _named(values):
        if name not in known:
            raise CheckpointError(
                f"{path}: {key} names {shown(name)}, which is no added token of tokenizer.json: "
                "transformers would add it"
            )
    declared = values.get("added_tokens_decoder")
    for token in declared.values() if isinstance(declared, dict) else ():
        for flag in FLAGS if isinstance(token, dict) and token.get("content") in added else ():
            found = getattr(added[token["content"]], flag)
            if token.get(flag, found) != found:
                raise CheckpointError(
                    f"{path}: added_tokens_decoder says that {flag} of {shown(token['content'])} "
                    f"is {shown(token[flag])}, and tokenizer.json {found}"
                )


def _check_qwen(tokenizer: Tokenizer, path: Path) -> None:
    expected: dict[str, Any] = {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        },
    }
    for key, wanted in expected.items():
        part = getattr(tokenizer, key)
        found = None if part is None else json.loads(part.__getstate__())
        for each in found.get("pretokenizers", ()) if found else ():
            each.pop("trim_offsets", None)  # which moves no token
        if found != wanted:
            raise CheckpointError(
                f"{path}: {key} is {shown(found)}, and transformers' Qwen2Tokenizer has another, "
                f"{shown(wanted)}; give tokenizer_class PreTrainedTokenizerFast in "
                f"{TOKENIZER_CONFIG} if the file is right"
            )


def _named(values: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """(key, token) of every token that tokenizer_config.json names."""
    further = [
        (key, each)
        for key in ("additional_special_tokens", "extra_special_tokens")
        for each in (values.get(key) or ())
        if isinstance(values.get(key), list)
    ]
    declared = values.get("added_tokens_decoder")
    if isinstance(declared, dict):
        further += [("added_tokens_decoder", each) for each in declared.values()]
    for key, token in [(f"{n}_token", values.get(f"{n}_token")) for n in NAMED_TOKENS] + further:
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            yield key, content
