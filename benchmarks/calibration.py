"""The built-in calibration texts, for other software that quantizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np


def builtin_rows(checkpoint: Path) -> list[np.ndarray]:
    """All built-in calibration texts or pairs as the export tokenizes them: int64 [tokens] each."""
    from embedport.checkpoint.spec import ModelSpec
    from embedport.exporters.texts import BUILTIN, tokenize_samples

    spec = ModelSpec.from_checkpoint(checkpoint)
    return tokenize_samples(spec, spec.max_length, BUILTIN)


def save_rows(rows: Sequence[np.ndarray], path: Path) -> None:
    """Write rows as two arrays: `ids`, all rows joined, and `ends`, where each row ends."""
    np.savez(path, ids=np.concatenate(rows), ends=np.cumsum([*map(len, rows)]))
