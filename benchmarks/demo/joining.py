"""Between the reranker's two training stages: the last layer's weights are set, not trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen3Model

from embedport.texts.prompts import RerankerTokenizer

from .model import HEAD
from .reranker import LAYERS, MARKS, answer_of, answers_of, last_layer

# Coordinates of a head that the rotary embedding rotates least.
SLOW = (HEAD // 2 - 1, HEAD - 1, HEAD // 2 - 2)
# Norm gain of the queries and keys that look for the marks.
SHARP = 2.0
# Scale of the fetched vectors relative to the states they are added to.
LOUD = 16.0
# Standard deviation of the resulting scores.
SPREAD = 2.0


def join_places(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> None:
    """Make the last layer fetch both vectors and add their inner product to "yes".

    Its heads look for the marks. Its SwiGLU multiplies: silu(q) d - silu(-q) d = q d, for each
    coordinate of the vectors' first halves.

    Args:
        model: The model after the first stage.
        pairs: Sample pairs, to estimate the spread of scores.
        tokenizer: The reranker's tokenizer.
    """
    last, gains = last_layer(model), model.norm.weight.detach()
    attention, mlp = last.self_attn, last.mlp
    width, heads = model.config.hidden_size, model.config.num_attention_heads
    half = width // 2
    model.eval()
    size = _size_of_states(model, pairs, tokenizer)
    difference = gains * answer_of(model, tokenizer.tokenizer).detach()
    part = torch.eye(width)
    with torch.no_grad():
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.fill_(SHARP)
        at_query, at_document, anywhere = part[list(MARKS)] * gains
        keys = torch.zeros(HEAD, width)
        keys[list(SLOW)] = torch.stack([at_query, at_document, anywhere])
        attention.k_proj.weight.copy_(keys.repeat(heads // 2, 1))
        attention.v_proj.weight.copy_(part[:half] * gains)
        out = torch.zeros(width, heads * HEAD)
        for head in range(heads):
            group, place = divmod(head, 2)
            queries = torch.zeros(HEAD, width)
            queries[SLOW[place]], queries[SLOW[2]] = anywhere, -0.5 * anywhere
            rows = slice(head * HEAD, (head + 1) * HEAD)
            attention.q_proj.weight[rows] = queries
            start = place * half + group * HEAD
            out[:, rows] = part[:, start : start + HEAD]
        # The fetched vectors dominate the state, and by themselves do not change the answer.
        out -= torch.outer(difference, difference @ out) / (difference @ difference)
        attention.o_proj.weight.copy_(LOUD * size * out)
        mlp.gate_proj.weight[: 2 * half] = torch.cat([part[:half], -part[:half]])
        mlp.up_proj.weight[: 2 * half] = torch.cat([part[half:], part[half:]])
        answer = difference / (difference @ difference) * size / half
        mlp.down_proj.weight[:, :half] = answer[:, None]
        mlp.down_proj.weight[:, half : 2 * half] = -answer[:, None]
        mlp.down_proj.weight.mul_(SPREAD / answers_of(model, pairs, tokenizer).std())


def _size_of_states(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> float:
    """Root mean square of the last tokens' states before the last layer, averaged over pairs."""
    sizes = []
    with torch.inference_mode():
        for ids in tokenizer.encode(pairs).ids:
            states = model(torch.from_numpy(ids)[None], output_hidden_states=True).hidden_states
            sizes.append(states[LAYERS - 1][0, -1].square().mean().sqrt().item())
    return float(np.mean(sizes))
