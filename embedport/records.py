"""Dataclasses restored from JSON, each value checked against its field's annotation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

WORDS = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    NoneType: "null",
    tuple: "a list",
    Mapping: "an object",
}


def read_record(kind: type[Record], values: Any, place: str = "") -> Record:
    """Restore a dataclass from the JSON form of `dataclasses.asdict`.

    A field with a default may be missing: early files lack later fields.

    Args:
        kind: The dataclass. Its fields are texts, numbers, true or false, None, Literal, tuples,
            mappings, other dataclasses, and unions of these; Any is not checked.
        values: The JSON value.
        place: Where it stands in the file, for messages; "" for the whole.

    Raises:
        ValueError: A key is missing or unknown, or a value is not what its annotation says.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{place or 'it'} should be an object, found {values!r:.80}")
    kinds, needed = _annotations(kind)
    if wrong := (values.keys() - kinds.keys()) | (needed - values.keys()):
        where = f" of {place}" if place else ""
        raise ValueError(f"missing or unknown keys{where}: {', '.join(sorted(wrong))}")
    return kind(
        **{key: _read(kinds[key], value, _below(place, key)) for key, value in values.items()}
    )


@cache
def _annotations(kind: type[DataclassInstance]) -> tuple[dict[str, Any], set[str]]:
    """Each field's annotation, and the names of those without a default."""
    no_default = {
        field.name
        for field in fields(kind)
        if field.default is MISSING and field.default_factory is MISSING
    }
    return get_type_hints(kind), no_default


def _below(place: str, key: str) -> str:
    return f"{place}.{key[:100]}" if place else key[:100]


def _read(kind: Any, value: Any, place: str) -> Any:
    """A value of an annotation; a list becomes a tuple, an object a dataclass.

    Raises:
        ValueError: It is none.
    """
    if kind is Any or type(value) is kind:
        return value
    if is_dataclass(kind):
        return read_record(kind, value, place)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        records: list[Any] = [arg for arg in args if is_dataclass(arg)]
        if records and isinstance(value, Mapping):
            return read_record(records[0], value, place)
        for arg in args:
            with suppress(ValueError):
                return _read(arg, value, place)
    elif origin is tuple and isinstance(value, list | tuple):
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) == len(value):
            return tuple(_read(*pair, place) for pair in zip(kinds, value, strict=True))
    elif origin is Mapping and isinstance(value, Mapping):
        return {key: _read(args[1], item, _below(place, key)) for key, item in value.items()}
    elif (origin is Literal and value in args) or (kind is float and type(value) is int):
        return value
    raise ValueError(f"{place} should be {_words(kind)}, found {value!r:.80}")


def _words(kind: Any) -> str:
    """An annotation in words, for messages."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        names = list(map(str, args))
        return " or ".join(names) if len(names) < 3 else f"one of {', '.join(names)}"
    if origin is Mapping and args[1] is str:
        return "texts by name"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(_words, args)))
    return WORDS.get(kind if origin is None else origin, "an object")
