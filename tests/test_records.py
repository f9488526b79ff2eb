"""Dataclasses from JSON: what an annotation does not allow is refused, with its place."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import pytest

from embedport.records import read_record


@dataclass(frozen=True)
class Part:
    """A record within another."""

    path: str
    sizes: tuple[int, int] | None = None


@dataclass(frozen=True)
class Whole:
    """A record with a field of every kind."""

    kind: Literal["a", "b"]
    alpha: float
    steps: tuple[Part | Literal["end"], ...]
    part: Part | None
    names: Mapping[str, str]
    parts: Mapping[str, Part] = field(default_factory=dict)
    form: Literal["x", "y", "z"] = "x"
    bias: bool = True
    free: Any = None


FULL = Whole("a", 2.5, (Part("p"), "end"), Part("q", (1, 2)), {"n": "t"}, {"m": Part("r")})


def test_what_is_written_is_read():
    for whole in (FULL, replace(FULL, alpha=1, part=None, steps=(), free=[{"any": None}])):
        assert read_record(Whole, json.loads(json.dumps(asdict(whole)))) == whole
        assert read_record(Whole, asdict(whole)) == whole
    needed = {key: asdict(FULL)[key] for key in ("kind", "alpha", "steps", "part", "names")}
    assert read_record(Whole, needed) == replace(FULL, parts={})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "c"}, "kind should be a or b, found 'c'"),
        ({"kind": ["a"]}, "kind should be a or b, found ['a']"),
        ({"form": None}, "form should be one of x, y, z, found None"),
        ({"alpha": "2"}, "alpha should be a number, found '2'"),
        ({"alpha": True}, "alpha should be a number, found True"),
        ({"bias": 1}, "bias should be true or false, found 1"),
        ({"steps": {}}, "steps should be a list, found {}"),
        ({"steps": ["start"]}, "steps should be an object or end, found 'start'"),
        ({"steps": [{"path": 3}]}, "steps.path should be a text, found 3"),
        ({"part": 3}, "part should be an object or null, found 3"),
        ({"part": {}}, "missing or unknown keys of part: path"),
        ({"part": {"path": "q", "sizes": [1, 2, 3]}}, "part.sizes should be a list or null, found"),
        ({"part": {"path": "q", "sizes": [1, 2.0]}}, "part.sizes should be a list or null, found"),
        ({"names": []}, "names should be texts by name, found []"),
        ({"names": {"n": 3}}, "names.n should be a text, found 3"),
        ({"parts": {"m": {"path": None}}}, "parts.m.path should be a text, found None"),
        ({"surprise": 1}, "missing or unknown keys: surprise"),
    ],
)
def test_what_does_not_fit_is_named(changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (its text is compared below)
        read_record(Whole, asdict(FULL) | changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("values", [None, [], "text"])
def test_no_object(values):
    with pytest.raises(ValueError, match="it should be an object, found"):
        read_record(Whole, values)
