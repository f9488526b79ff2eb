"""NF4, bitsandbytes' 4 bits: sixteen levels between -1 and 1, quantiles of a normal distribution.

Dettmers et al., QLoRA, arXiv:2305.14314, appendix E. A value is its code's level times its block's
scale.
"""

from __future__ import annotations

import numpy as np

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
# Between two of these, a level is the nearest.
BOUNDS = (LEVELS[1:] + LEVELS[:-1]) / 2
# Weights of a row that share a scale.
BLOCK = 64
