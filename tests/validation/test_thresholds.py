"""The limits by precision."""

from pathlib import Path

import pytest

from embedport.errors import InputError
from embedport.validation.thresholds import THRESHOLDS, find_thresholds


def test_unknown_precision():
    with pytest.raises(InputError, match="for precision 'int3', only for fp32, fp16, bf16"):
        find_thresholds("int3")
    assert find_thresholds("fp16", min_cosine=0.9).min_cosine == 0.9
    assert find_thresholds("fp16", min_cosine=0.9).max_score_difference == 0.01


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
