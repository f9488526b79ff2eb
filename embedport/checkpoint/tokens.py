"""The tokenizer's settings beside its vocabulary, as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from tokenizers import AddedToken, Tokenizer

from ..errors import CheckpointError
from ..strict_json import read_optional_json
from .keys import shown

TOKENIZER_CONFIG, MODEL_CONFIG = "tokenizer_config.json", "config.json"
# Classes that use tokenizer.json unchanged, and classes that replace its normalizer and
# pre-tokenizer with Qwen's.
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
QWEN_CLASSES = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
# Tokens that default to <|endoftext|> if tokenizer_config.json does not name them.
QWEN_DEFAULTS = ("unk_token", "eos_token", "pad_token")
QWEN_END = "<|endoftext|>"
# Files of earlier versions.
TOKEN_MAP, ADDED = "special_tokens_map.json", "added_tokens.json"
# Keys that hold several tokens.
FURTHER = ("additional_special_tokens", "extra_special_tokens", "model_specific_special_tokens")
# Advice where tokenizer_config.json contradicts a right tokenizer.json.
KEEP = f"if tokenizer.json is right, give tokenizer_class {PLAIN_CLASSES[0]} in {TOKENIZER_CONFIG}"
# Flags that decide where an added token matches in a text.
FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_MODEL: dict[str, tuple[Any, ...]] = {
    "unk_token": (None,),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "fuse_unk": (False,),
    "byte_fallback": (False,),
    "ignore_merges": (False,),
}
NORMALIZER = {"type": "NFC"}
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
    ],
}


def read_token_settings(folder: Path) -> tuple[bool, Literal["left", "right"]]:
    """(split_special_tokens, truncation_side) of a tokenizer.

    Raises:
        CheckpointError: tokenizer_config.json asks for an unsupported feature.
    """
    path = folder / TOKENIZER_CONFIG
    values = read_optional_json(path)
    if values.get("auto_map"):
        raise CheckpointError(
            f"{path}: auto_map names code of the checkpoint's own, which is never run"
        )
    file, kind = _find_class(values, folder)
    if kind not in (None, *PLAIN_CLASSES, *QWEN_CLASSES):
        raise CheckpointError(
            f"{file}: tokenizer_class should be one of {', '.join(QWEN_CLASSES + PLAIN_CLASSES)}, "
            f"found {shown(kind)}"
        )
    names = values.get("model_input_names")
    if isinstance(names, list) and "attention_mask" not in names:
        raise CheckpointError(
            f"{path}: model_input_names is {shown(names)}, without attention_mask: transformers "
            "would read padding as text, and a vector would depend on its batch; add it"
        )
    files = values.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or set(files) - {"tokenizer.json"}:
        raise CheckpointError(
            f"{path}: fast_tokenizer_files names {shown(files)}, of which transformers chooses by "
            "its version, and only tokenizer.json is read: take the key out if that is right"
        )
    if values.get("tokenizer_file"):
        raise CheckpointError(
            f"{path}: tokenizer_file names {shown(values['tokenizer_file'])}, which transformers "
            "before 5.13 opens in place of tokenizer.json: take the key out"
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


def _find_class(values: dict[str, Any], folder: Path) -> tuple[Path, object]:
    """(file, tokenizer_class): where tokenizer_config.json names none, config.json may."""
    kind = values.get("tokenizer_class")
    if kind is not None:
        return folder / TOKENIZER_CONFIG, kind
    path = folder / MODEL_CONFIG
    return path, read_optional_json(path).get("tokenizer_class")


def is_qwen(values: dict[str, Any], folder: Path) -> bool:
    """Whether transformers opens a tokenizer as Qwen2Tokenizer, which has its own settings.

    Args:
        values: The contents of tokenizer_config.json.
        folder: Its folder.
    """
    return _find_class(values, folder)[1] not in PLAIN_CLASSES


def special_tokens(folder: Path) -> tuple[dict[str, str], set[str]]:
    """(named tokens, all special tokens) of a tokenizer, as transformers 5 collects them.

    The named ones are variables of a chat template: eos_token, pad_token, and names of the
    checkpoint's own. A token that is special in tokenizer.json but not named is not among them.
    """
    values = read_optional_json(folder / TOKENIZER_CONFIG)
    sources = (values, _read_token_map(values, folder))
    defaults = QWEN_DEFAULTS if is_qwen(values, folder) else ()
    named: dict[str, str] = dict.fromkeys(defaults, QWEN_END)
    others: set[str] = set()
    for key, value in ((key, value) for source in sources for key, value in source.items()):
        if key in FURTHER and isinstance(value, dict):
            named |= {name: text for name, token in value.items() if (text := _content(token))}
        elif key in FURTHER and isinstance(value, list):
            others |= {text for token in value if (text := _content(token))}
        elif key.endswith("_token"):
            named.pop(key, None)
            if text := _content(value):
                named[key] = text
    return named, {*named.values(), *others}


def read_length(folder: Path, positions: int, declared: int | None) -> int:
    """Maximum tokens of a text; longer texts are truncated.

    Args:
        folder: The checkpoint's folder.
        positions: The model's max_position_embeddings.
        declared: sentence-transformers' max_seq_length, which overrides the tokenizer's own.

    Raises:
        CheckpointError: `declared` exceeds `positions`.
    """
    if declared is not None:
        if declared > positions:
            raise CheckpointError(
                f"{folder / 'sentence_bert_config.json'}: max_seq_length is {declared}, and the "
                f"model has {positions} positions (max_position_embeddings)"
            )
        return declared
    # Any number may stand here: transformers writes 1e30 for "no limit".
    values = read_optional_json(folder / TOKENIZER_CONFIG)
    value = values.get("model_max_length", values.get("max_len"))
    if isinstance(value, int | float) and value >= 1:
        return int(min(value, positions))
    return positions


def check_as_transformers(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuse a tokenizer that transformers would load differently than its tokenizer.json says.

    The class Qwen2Tokenizer takes the vocabulary, the merges and the post-processor from
    tokenizer.json, but has its own normalizer, pre-tokenizer and flags of named tokens. Every class
    adds the tokens that the other files name.

    Raises:
        CheckpointError: transformers would load it differently.
    """
    path = folder / TOKENIZER_CONFIG
    values = read_optional_json(path)
    if values.get("add_prefix_space"):
        raise CheckpointError(f"{path}: add_prefix_space is true, and only false is supported")
    if getattr(tokenizer.model, "dropout", None):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: the model has a dropout of {tokenizer.model.dropout}, "
            "which would give a text other tokens each time; take it out"
        )
    if is_qwen(values, folder):
        _check_qwen(tokenizer, folder / "tokenizer.json")
    for key, value in _read_token_map(values, folder).items():
        if key not in FURTHER and (key.startswith("add_") or not key.endswith("_token")):
            raise CheckpointError(
                f"{folder / TOKEN_MAP}: {key} is {shown(value)}, and only tokens may stand here; "
                f"put it into {TOKENIZER_CONFIG}"
            )
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = list(_named(values, folder))
    for file, key, name in named:
        if name not in added:
            raise CheckpointError(
                f"{file}: {key} names {shown(name)}, not an added token of tokenizer.json: "
                "transformers would add it"
            )
    declared = values.get("added_tokens_decoder")
    # Whether a token is special matters only where special tokens are split.
    flags = (*FLAGS, "special") if values.get("split_special_tokens") else FLAGS
    for token in declared.values() if isinstance(declared, dict) else ():
        content = _content(token) or ""
        for flag in flags if isinstance(token, dict) and content in added else ():
            actual = getattr(added[content], flag)
            if token.get(flag, actual) != actual:
                raise CheckpointError(
                    f"{path}: added_tokens_decoder says that {flag} of {shown(content)} "
                    f"is {shown(token[flag])}, but tokenizer.json says {actual}"
                )
    if not is_qwen(values, folder):
        if values.get("split_special_tokens"):
            _check_special(added, folder)
        return
    _check_ids(tokenizer, values, folder)
    # Tokens that are not named have the class's default.
    names = {name for _, key, name in named if key.endswith("_token") or key in FURTHER}
    names |= {QWEN_END for key in QWEN_DEFAULTS if key not in values}
    for name in sorted(names):
        _check_flags(added.get(name), name, folder / "tokenizer.json")


def _check_special(added: Mapping[str, AddedToken], folder: Path) -> None:
    """Refuse a named token that is not special in tokenizer.json: transformers makes it so."""
    for key, name in special_tokens(folder)[0].items():
        if not added[name].special:
            raise CheckpointError(
                f"{folder / 'tokenizer.json'}: special of the added token {shown(name)} is False, "
                f"and as {key} transformers makes it True and, by split_special_tokens, plain "
                f"text; make it True here too, or take {key} out of {TOKENIZER_CONFIG}"
            )


def _check_ids(tokenizer: Tokenizer, values: dict[str, Any], folder: Path) -> None:
    """Refuse added tokens that are others, or have other ids, beside tokenizer.json than in it.

    Qwen2Tokenizer adds those of added_tokens_decoder alone, in the order of their ids; without it
    those of tokenizer.json and added_tokens.json.
    """
    ids = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    decoder = values.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        path, key = folder / TOKENIZER_CONFIG, "added_tokens_decoder"
        declared = [(_content(token), id_) for id_, token in decoder.items()]
    else:
        path, key = folder / ADDED, "it"
        declared = list(read_optional_json(path).items())
    for token, id_ in declared:
        if token in ids and str(id_) != str(ids[token]):
            raise CheckpointError(
                f"{path}: {key} gives {shown(token)} the id {shown(id_)}, and tokenizer.json "
                f"{ids[token]}: transformers' Qwen2Tokenizer numbers tokens by the first; {KEEP}"
            )
    lacking = sorted(ids.keys() - {token for token, _ in declared})
    if isinstance(decoder, dict) and lacking:
        raise CheckpointError(
            f"{path}: {key} lacks {shown(lacking[0])}, an added token of tokenizer.json, which "
            f"transformers' Qwen2Tokenizer would read as plain text; add it, or {KEEP}"
        )


def _check_flags(token: AddedToken | None, name: str, path: Path) -> None:
    """Refuse a named token that transformers' Qwen2Tokenizer would add or give other flags."""
    if token is None:
        raise CheckpointError(
            f"{path}: {shown(name)} is not an added token, and transformers' Qwen2Tokenizer would "
            f"add it; name the tokens that take its place in {TOKENIZER_CONFIG}: "
            f"{', '.join(QWEN_DEFAULTS)}"
        )
    for flag, expected in {**dict.fromkeys(FLAGS, False), "special": True}.items():
        if getattr(token, flag) != expected:
            raise CheckpointError(
                f"{path}: {flag} of the added token {shown(name)} is {getattr(token, flag)}, and "
                f"transformers' Qwen2Tokenizer makes it {expected}; give tokenizer_class "
                f"PreTrainedTokenizerFast in {TOKENIZER_CONFIG} if the file is right"
            )


def _check_qwen(tokenizer: Tokenizer, path: Path) -> None:
    model = tokenizer.model
    checks: dict[str, tuple[Any, tuple[Any, ...]]] = {  # key to (value, accepted values)
        "model's type": (type(model).__name__, ("BPE",)),
        **{f"model's {key}": (getattr(model, key, None), ok) for key, ok in QWEN_MODEL.items()},
    }
    for key, expected in (("normalizer", NORMALIZER), ("pre_tokenizer", PRE_TOKENIZER)):
        part = getattr(tokenizer, key)
        values = None if part is None else json.loads(part.__getstate__())
        for component in values.get("pretokenizers", ()) if values else ():
            component.pop("trim_offsets", None)  # does not affect tokens
        checks[key] = (values, (expected,))
    for key, (value, accepted) in checks.items():
        if value not in accepted:
            raise CheckpointError(
                f"{path}: {key} is {shown(value)}, but that of transformers' Qwen2Tokenizer is "
                f"{shown(accepted[0])}; give tokenizer_class PreTrainedTokenizerFast in "
                f"{TOKENIZER_CONFIG} if the file is right"
            )


def _named(values: dict[str, Any], folder: Path) -> Iterable[tuple[Path, str, str]]:
    """(file, key, token) of every token named in a file beside tokenizer.json."""
    path = folder / TOKENIZER_CONFIG
    entries = list(_pairs(values, path))
    declared = values.get("added_tokens_decoder")
    entries += _pairs(_read_token_map(values, folder), folder / TOKEN_MAP)
    if isinstance(declared, dict):
        entries += [(path, "added_tokens_decoder", token) for token in declared.values()]
    else:  # transformers reads it only without added_tokens_decoder
        entries += [(folder / ADDED, ADDED, token) for token in read_optional_json(folder / ADDED)]
    for file, key, token in entries:
        if (content := _content(token)) is not None:
            yield file, key, content


def _content(token: object) -> str | None:
    """The text of a token, which is given as a string or as an object."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _pairs(values: dict[str, Any], path: Path) -> Iterable[tuple[Path, str, Any]]:
    """(file, key, token) of keys that name tokens (bos_token, …) or lists of tokens."""
    for key, value in values.items():
        if key in FURTHER and isinstance(value, list | dict):
            tokens = value.values() if isinstance(value, dict) else value
            yield from ((path, key, token) for token in tokens)
        elif key.endswith("_token") and not key.startswith("add_"):
            yield path, key, value


def _read_token_map(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """special_tokens_map.json, which transformers reads only without added_tokens_decoder."""
    has_decoder = isinstance(values.get("added_tokens_decoder"), dict)
    return {} if has_decoder else read_optional_json(folder / TOKEN_MAP)
