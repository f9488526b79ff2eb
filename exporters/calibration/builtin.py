"""The built-in calibration texts and pairs, written for this project.

`validate` judges by other texts: see `embedport.texts.samples`. The first ones are a cross-section,
with the openings that are known to overflow in fp16 (see `fp16_overflow`).
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from importlib.resources import files
from typing import Any

from ...texts.samples import Pair, Sample


@cache
def calibration_samples() -> tuple[Sample, ...]:
    """512 texts: queries, passages and code in a dozen languages, 1 to 350 words."""
    return tuple(
        Sample(row["text"], row.get("prompt", "document")) for row in _rows("texts.jsonl.gz")
    )


@cache
def calibration_pairs() -> tuple[Pair, ...]:
    """256 pairs: 68 queries, each with relevant, related and other documents."""
    return tuple(Pair(**row) for row in _rows("pairs.jsonl.gz"))


def _rows(name: str) -> list[dict[str, Any]]:
    packed = (files("embedport.exporters.calibration") / name).read_bytes()
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
