"""Loads a tokenizer.json, which is checked before the tokenizers library reads it.

The library trusts the file: some structures kill the process (a normalizer that lengthens a text
without end, an id far beyond the vocabulary), and Python cannot catch that. So everything that can
grow is limited here. Errors that the library detects on loading, or on tokenizing a short text,
are an Exception or, from a Rust panic, a BaseException; both become a CheckpointError.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import CheckpointError
from ..files import read_small
from ..integrity import cache_folder
from ..strict_json import parse_json, read_optional_json
from .tokens import TOKENIZER_CONFIG, is_qwen

# Maximum bytes of the file; Qwen3's has 11 MB.
LARGEST = 64 << 20
# Ids are below this: the library visits every id up to the largest when it writes a vocabulary.
MOST_IDS = 1 << 22
# Maximum characters of all added tokens together: the library builds an automaton from them.
ADDED_CHARACTERS = 1 << 20
# Maximum bytes, as JSON, of all but the vocabulary, the merges and the added tokens.
RULES_BYTES = 64 << 10
# Maximum factor by which normalizer and pre-tokenizer may lengthen a text.
GROWTH = 256
# Maximum ids that the post-processor may add.
MOST_ADDED = 1000
# Models with an object as vocabulary. Unigram is left out: it takes some hundred bytes of memory
# per character.
MODELS = ("BPE", "WordPiece", "WordLevel")
# Version of the checks, part of a checked file's cache name.
CHECKS = "2"


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, without padding and truncation.

    The structure is checked once per file content; the user's cache folder remembers the files that
    passed.

    Raises:
        CheckpointError: The file is missing, damaged, or exceeds a limit.
    """
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing; the checkpoint needs its fast tokenizer, which transformers' "
            "AutoTokenizer writes: from_pretrained, then save_pretrained"
        )
    try:
        data = read_small(path, LARGEST)
        stamp = cache_folder("tokenizers") / f"{hashlib.sha256(data).hexdigest()}-{CHECKS}"
        if not _is_there(stamp):
            check_structure(parse_json(data.decode("utf-8")))
            with contextlib.suppress(OSError):
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.touch()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    with tokenizing(path):
        tokenizer = Tokenizer.from_buffer(data)
        _check_defaults(tokenizer, path)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("a")
    return tokenizer


def _is_there(stamp: Path) -> bool:
    """Whether a file is in the cache folder, which may be one that this user cannot read."""
    with contextlib.suppress(OSError):
        return stamp.exists()
    return False


def _check_defaults(tokenizer: Tokenizer, path: Path) -> None:
    """Refuse settings of tokenizer.json that transformers takes where no other file has them."""
    config = read_optional_json(path.parent / TOKENIZER_CONFIG)
    side = (tokenizer.truncation or {}).get("direction", "right")
    if side != "right" and not config.get("truncation_side"):
        raise CheckpointError(
            f"{path}: truncation has the direction {side!r}, and {TOKENIZER_CONFIG} names no "
            f"truncation_side: name it there, {side!r} or 'right'"
        )
    pad = (tokenizer.padding or {}).get("pad_token")
    if pad is not None and "pad_token" not in config and not is_qwen(config, path.parent):
        raise CheckpointError(
            f"{path}: padding has the pad_token {pad!r}, and {TOKENIZER_CONFIG} names none: "
            "transformers would make it a special token; name it there, or null"
        )


@contextlib.contextmanager
def tokenizing(name: object) -> Generator[None]:
    """Turn exceptions of the library, Rust panics included, into CheckpointError.

    Args:
        name: The tokenizer's name in the error: its path if known.

    Raises:
        CheckpointError: The library raised an exception.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # a Rust panic is not an Exception
        raise CheckpointError(f"{name} is not a tokenizer that works: {error}") from error


def check_ids(ids: Iterable[int], rows: int, path: Path, of: str) -> None:
    """Refuse token ids for which the embedding table has no row.

    Args:
        ids: Token ids.
        rows: Number of rows of the table.
        path: The tokenizer.json, for the error.
        of: Description of the ids, for the error.

    Raises:
        CheckpointError: An id has no row.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        raise CheckpointError(
            f"{path}: {of} should be below {rows}, the rows of the embedding table (vocab_size in "
            f"config.json), found token {largest}"
        )


def check_structure(values: object) -> None:
    """Check all that the library does not check itself.

    Args:
        values: The JSON of a tokenizer.json.

    Raises:
        ValueError: A value is invalid or exceeds a limit.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError("it should be an object with a model")
    model, added = values["model"], values.get("added_tokens") or []
    kind, vocabulary = model.get("type", "BPE"), model.get("vocab")
    if kind not in MODELS or not isinstance(vocabulary, dict):
        raise ValueError(
            f"model should be {', '.join(MODELS)} with an object of tokens and ids, found {kind!r}"
        )
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise ValueError("added_tokens should be a list of objects")
    _check_range(vocabulary.values(), "an id of the vocabulary")
    _check_range((token.get("id") for token in added), "an added token's id")
    ids = [token["id"] for token in added]
    if ids != sorted(set(ids)):  # the library numbers tokens by place, transformers by id
        raise ValueError("added_tokens should be in the order of their ids, which should differ")
    if sum(len(str(token.get("content"))) for token in added) > ADDED_CHARACTERS:
        raise ValueError(f"added tokens should have {ADDED_CHARACTERS:,} characters at most")
    rules = {key: value for key, value in values.items() if key not in ("model", "added_tokens")}
    rules["model"] = {k: value for k, value in model.items() if k not in ("vocab", "merges")}
    if (size := len(json.dumps(rules))) > RULES_BYTES:
        raise ValueError(
            f"all but vocabulary, merges and added tokens should have {RULES_BYTES:,} bytes at "
            f"most, found {size:,}"
        )
    _check_growth(rules)
    _check_post_processor(rules.get("post_processor"))


def _check_range(ids: Iterable[Any], noun: str) -> None:
    for id_ in ids:
        if type(id_) is not int or not 0 <= id_ < MOST_IDS:
            raise ValueError(f"{noun} should be from 0 to {MOST_IDS - 1:,}, found {id_!r}")


def _check_growth(rules: Mapping[str, Any]) -> None:
    """Limit the product of the factors by which the rules may lengthen a text."""
    factors = [1]
    for key in ("normalizer", "pre_tokenizer"):
        for rule in _components(rules.get(key), key):
            if rule["type"] == "Precompiled":
                raise ValueError("a Precompiled normalizer is not supported")
            if rule["type"] == "Replace":
                factors.append(max(1, len(str(rule.get("content")).encode())))
            elif rule["type"] in ("ByteLevel", "Metaspace"):
                factors.append(3)
    if (growth := math.prod(factors)) > GROWTH:
        raise ValueError(
            f"normalizer and pre_tokenizer may make a text {growth:,} times as long, more than "
            f"{GROWTH}"
        )


def _check_post_processor(rules: object) -> None:
    ids: list[Any] = []
    for rule in _components(rules, "post_processor"):
        if rule["type"] != "TemplateProcessing":
            continue
        single, special = rule.get("single"), rule.get("special_tokens")
        if not isinstance(single, list) or not isinstance(special, dict):
            raise ValueError("post_processor should have a list single, an object special_tokens")
        kinds = [tuple(piece) if isinstance(piece, dict) else None for piece in single]
        allowed = {("Sequence",), ("SpecialToken",)}
        if not allowed.issuperset(kinds) or kinds.count(("Sequence",)) > 1:
            raise ValueError(
                "post_processor: single should be special tokens and the text once, found "
                f"{single!r:.200}"
            )
        for name, token in special.items():
            if not isinstance(token, dict) or not isinstance(token.get("ids"), list):
                raise ValueError(f"post_processor: {name!r} should have a list of ids")
            ids += token["ids"]
        if len(single) * len(ids) > MOST_ADDED:
            raise ValueError(
                f"post_processor should add {MOST_ADDED} ids at most, found {len(ids):,} in "
                f"{len(single)} places"
            )
    _check_range(ids, "an id of the post_processor")


def _components(rule: object, name: str) -> Iterator[dict[str, Any]]:
    """A rule and, if it is a sequence, its components, recursively."""
    if rule is None:
        return
    if not isinstance(rule, dict) or not isinstance(rule.get("type"), str):
        raise ValueError(f"{name} should be an object with a type, found {rule!r:.80}")
    yield rule
    for key in ("normalizers", "pretokenizers", "processors"):
        parts = rule.get(key) or []
        if not isinstance(parts, list):
            raise ValueError(f"{name}: {key} should be a list, found {parts!r:.80}")
        for part in parts:
            yield from _components(part, name)
