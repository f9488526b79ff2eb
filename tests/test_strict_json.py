"""JSON within limits of depth, digits and values."""

import pytest

from embedport.strict_json import MOST_VALUES, load_json, parse_json


def test_depth():
    assert parse_json("[" * 60 + "]" * 60)
    for text in ("[" * 70 + "]" * 70, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 100_000):
        with pytest.raises(ValueError, match="more than 64 deep"):
            parse_json(text)


@pytest.mark.parametrize("digits", ["9" * 101, "9" * 10_000, "0." + "1" * 1000])
def test_digits(digits):
    with pytest.raises(ValueError, match="100 digits at most"):
        parse_json(f'{{"a": {digits}}}')
    assert parse_json("1000000000000000019884624838656") == int(1e30)


def test_values():
    with pytest.raises(ValueError, match=f"{MOST_VALUES:,} values at most"):
        parse_json("[" + "1," * MOST_VALUES + "1]")


def test_lone_surrogate():
    assert parse_json('"\\ud83d\\ude00"') == "😀"
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D"):
        parse_json('"\\ud83d"')


def test_bytes(tmp_path):
    """A mark at the beginning and other encodings are refused, as ever."""
    for data in (b"\xef\xbb\xbf{}", "{}".encode("utf-16"), b"\xff{}"):
        (tmp_path / "a.json").write_bytes(data)
        with pytest.raises(ValueError, match=r"BOM|decode"):
            load_json(tmp_path / "a.json")
