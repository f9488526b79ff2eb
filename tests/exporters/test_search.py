"""Choosing formats within a size, against every choice there is."""

import itertools

import numpy as np
import pytest

from embedport.exporters.calibration import search
from embedport.exporters.calibration.search import _choose_within, _Level


def random_options(generator, matrices=6):
    """Levels with more bytes and less error, one after another."""
    options = {}
    for i in range(matrices):
        sizes = np.cumsum(generator.integers(1, 40, 4)) * 64
        errors = np.sort(generator.random(4))[::-1] * generator.choice([1, 10])
        options[f"m{i}"] = [
            _Level(f"f{level}", int(size), float(error))
            for level, (size, error) in enumerate(zip(sizes, errors, strict=True))
        ]
    return options


def total(options, texts, value):
    return sum(
        getattr(level, value)
        for name, levels in options.items()
        for level in levels
        if level.format == texts[name]
    )


@pytest.mark.parametrize("seed", range(8))
def test_no_choice_is_better(seed):
    generator = np.random.default_rng(seed)
    options = random_options(generator)
    smallest = sum(levels[0].bytes for levels in options.values())
    room = int(generator.integers(0, 9000))
    texts = _choose_within(options, room)
    assert list(texts) == list(options)
    assert total(options, texts, "bytes") <= smallest + room
    best = min(
        sum(level.error for level in levels)
        for levels in itertools.product(*options.values())
        if sum(level.bytes for level in levels) <= smallest + room
    )
    assert total(options, texts, "error") == pytest.approx(best)


def test_sizes_are_rounded_up_where_there_are_many(monkeypatch):
    """Never beyond the size, and little worse."""
    options = random_options(np.random.default_rng(0))
    smallest, room = sum(levels[0].bytes for levels in options.values()), 6000
    exact = _choose_within(options, room)
    monkeypatch.setattr(search, "MOST_SIZES", 40)
    texts = _choose_within(options, room)
    assert total(options, texts, "bytes") <= smallest + room
    assert total(options, exact, "error") <= total(options, texts, "error")
    assert total(options, texts, "error") < total(options, exact, "error") * 1.5


def test_a_large_matrix_takes_the_place_of_many_small_ones():
    """The embedding table: in the order of error per byte the small ones would leave no room."""
    small = {f"m{i}": [_Level("4", 10, 1.0), _Level("8", 20, 0.4)] for i in range(10)}
    options = small | {"table": [_Level("4", 100, 8.0), _Level("8", 200, 3.0)]}
    texts = _choose_within(options, 100)
    assert texts == dict.fromkeys(small, "8") | {"table": "4"}
    options["table"][1] = _Level("8", 200, 1.0)
    assert _choose_within(options, 100) == dict.fromkeys(small, "4") | {"table": "8"}
