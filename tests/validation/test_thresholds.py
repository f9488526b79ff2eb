"""The limits by precision."""

from dataclasses import replace
from pathlib import Path

import pytest

from embedport.errors import InputError
from embedport.validation.thresholds import THRESHOLDS, find_thresholds


def test_unknown_precision():
    with pytest.raises(InputError, match="for precision 'int3', only for fp32, fp16, bf16"):
        find_thresholds("int3")
    assert find_thresholds("fp16", min_cosine=0.9).min_cosine == 0.9
    assert find_thresholds("fp16", min_cosine=0.9).max_score_difference == 0.01


def test_arithmetic_in_16_bits_widens_what_the_last_bit_moves():
    """A batch's other rows, and the length; the limits on results stay."""
    wide = {"min_invariance": 0.995, "max_invariance_difference": 0.02, "max_length_error": 1e-3}
    for precision in ("int8", "int4"):
        assert find_thresholds(precision) == THRESHOLDS[precision]
        expected = replace(THRESHOLDS[precision], **wide)
        assert find_thresholds(precision, arithmetic="bf16") == expected
    for precision in ("fp16", "bf16"):
        assert find_thresholds(precision, arithmetic=precision) == THRESHOLDS[precision]


def test_batches_change_nothing_in_fp32():
    found = {
        name: (each.min_invariance, each.max_invariance_difference, each.max_length_error)
        for name, each in THRESHOLDS.items()
    }
    exact = {name for name, limits in found.items() if limits == (0.999999, 1e-5, 1e-5)}
    assert exact == {"fp32", "int8", "int8-weight", "int4", "mixed"}
    cosines, differences, lengths = zip(*found.values(), strict=True)
    assert (min(cosines), max(differences), max(lengths)) == (0.995, 0.02, 1e-3)


def test_the_documented_limits_are_the_real_ones():
    text = (Path(__file__).parents[2] / "docs" / "quantization.md").read_text(encoding="utf-8")
    rows = text.split("## Limits")[1].split("## What was measured")[0].splitlines()
    found = {}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        if len(cells) == 4 and cells[1].startswith("0."):
            limits = tuple(map(float, cells[1:]))
            found |= dict.fromkeys(cells[0].split(", "), limits)
    assert found == {
        name: (each.min_cosine, each.max_score_difference, each.max_ndcg_loss)
        for name, each in THRESHOLDS.items()
    }
