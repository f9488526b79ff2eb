"""A tokenizer.json, checked before the tokenizers library reads it.

The library trusts the file: some structures end the process (a normalizer that makes a text longer
and longer, an id far beyond the vocabulary), and no Python handler sees that. So what can grow is
bounded here. What the library itself notices while it reads, or when a short text goes through, it
raises as an Exception or, from a Rust panic, as a BaseException; both become a CheckpointError.
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

from .errors import CheckpointError
from .files import parse_json, read_small
from .integrity import cache_folder

# Bytes; Qwen3's has 11 MB.
LARGEST = 64 << 20
# Ids are below this: the library visits each one up to the largest when it writes a vocabulary.
MOST_IDS = 1 << 22
# Characters of all added tokens together, from which it builds an automaton.
ADDED_CHARACTERS = 1 << 20
# Bytes, as JSON, of all but the vocabulary, the merges and the added tokens.
RULES_BYTES = 64 << 10
# Times that normalizer and pre-tokenizer may lengthen a text.
GROWTH = 256
# Ids that the post-processor may add.
MOST_ADDED = 1000
# Models whose vocabulary is an object; a Unigram's takes some hundred bytes a character in memory.
MODELS = ("BPE", "WordPiece", "WordLevel")
# Counts in the name under which a checked file is remembered.
CHECKS = "1"


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json, with no padding and no truncation set.

    Its structure is checked once for each content: that it was good is remembered in the user's
    cache folder, as hashes of files are.

    Raises:
        CheckpointError: The file is missing, damaged, or beyond a bound.
    """
    if not path.exists():
        raise CheckpointError(f"{path} is missing; the checkpoint needs its fast tokenizer")
    try:
        data = read_small(path, LARGEST)
        stamp = cache_folder("tokenizers") / f"{hashlib.sha256(data).hexdigest()}-{CHECKS}"
        if not stamp.exists():
            check_structure(parse_json(data.decode("utf-8")))
            with contextlib.suppress(OSError):
                stamp.parent.mkdir(parents=True, exist_ok=True)
                stamp.touch()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    with tokenizing(path):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode("a")
    return tokenizer


@contextlib.contextmanager
def tokenizing(name: object) -> Generator[None]:
    """Turn what the library raises, a Rust panic too, into an error.

    Args:
        name: What the error calls the tokenizer, its path if that is known.

    Raises:
        CheckpointError: The library raised something.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, CheckpointError):
        raise
    except BaseException as error:  # a panic is no Exception
        raise CheckpointError(f"{name} is not a tokenizer that works: {error}") from error


def check_ids(ids: Iterable[int], rows: int, path: Path, of: str) -> None:
    """Refuse ids that the embedding table has no row for.

    Args:
        ids: Token ids.
        rows: The table's.
        path: The tokenizer.json.
        of: Where the ids are from, for the error.

    Raises:
        CheckpointError: One is beyond the table.
    """
    largest = max(ids, default=0)
    if largest >= rows:
        raise CheckpointError(
            f"{path}: {of} should be below {rows}, the rows of the embedding table (vocab_size in "
            f"config.json), found token {largest}"
        )


def check_structure(values: object) -> None:
    """Check what the library would take on trust.

    Args:
        values: The JSON of a tokenizer.json.

    Raises:
        ValueError: Something is beyond a bound, or not what it should be.
    """
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise ValueError("it should be an object with a model")
    model, added = values["model"], values.get("added_tokens") or []
    kind, vocabulary = model.get("type", "BPE"), model.get("vocab")
    if kind not in MODELS or not isinstance(vocabulary, dict):
        raise ValueError(
            f"model should be {', '.join(MODELS)} with an object of tokens and ids, found {kind!r}"
        )
    if not isinstance(added, list) or not all(isinstance(each, dict) for each in added):
        raise ValueError("added_tokens should be a list of objects")
    _check_range(vocabulary.values(), "an id of the vocabulary")
    _check_range((each.get("id") for each in added), "an added token's id")
    if sum(len(str(each.get("content"))) for each in added) > ADDED_CHARACTERS:
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
    for each in ids:
        if type(each) is not int or not 0 <= each < MOST_IDS:
            raise ValueError(f"{noun} should be from 0 to {MOST_IDS - 1:,}, found {each!r}")


def _check_growth(rules: Mapping[str, Any]) -> None:
    """Each rule may multiply the length of what the one before it gave."""
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
        kinds = [tuple(each) if isinstance(each, dict) else None for each in single]
        known = {("Sequence",), ("SpecialToken",)}
        if not known.issuperset(kinds) or kinds.count(("Sequence",)) > 1:
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
    """A rule, and those that it is a sequence of."""
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
