"""The reranker's training, in two stages.

Comparing two texts is hard to discover by gradient descent from "yes" and "no" alone. So the model
begins as the embedder with one layer more. The first stage teaches it, in one text, to make the
embedder's vector of the query behind the query, and that of the document behind the document, and
to mark the two places. What the embedder has at the tokens between is learnt too: there are many of
them, and each shows which tokens belong together. Then the last layer is made to fetch both vectors
and to add their inner product to "yes". The second stage trains everything on what the embedder
itself ranks high: of texts that are new to it against the truth and the teacher's opinion, of
others against an opinion alone. What is kept is a mean of the model before and after it, which
ranks a little better than either (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).

Many steps of few pairs teach far more in an hour than few steps of many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from embedport.prompts import END_OF_TEXT, RerankerTokenizer

from .model import GEOMETRY, last_states, make_model, split_prefix

LAYERS = 4
# Tokens behind the query and behind the document, at which their vectors are made.
QUERY_PLACE, DOCUMENT_PLACE = "<Document", "</think>"
WIDTH = GEOMETRY.hidden_size
HALF = WIDTH // 2
# The last coordinates of a state say whether its token is a query's place, a document's, or any.
MARKS = (WIDTH - 3, WIDTH - 2, WIDTH - 1)


def make_reranker(embedder: Qwen3Model, tokenizer: Tokenizer, seed: int) -> Qwen3Model:
    """The embedder with a last layer that does nothing yet."""
    weights = embedder.state_dict()
    model = make_model(weights["embed_tokens.weight"].numpy(), seed, num_layers=LAYERS)
    model.load_state_dict(weights, strict=False)
    last = last_layer(model)
    with torch.no_grad():
        last.self_attn.o_proj.weight.zero_()
        last.mlp.down_proj.weight.zero_()
        for place in (QUERY_PLACE, DOCUMENT_PLACE):
            row = model.embed_tokens.weight[token_of(tokenizer, END_OF_TEXT)]
            model.embed_tokens.weight[token_of(tokenizer, place)] = row
    return model


def last_layer(model: Qwen3Model) -> Qwen3DecoderLayer:
    """The one that the embedder does not have."""
    return cast(Qwen3DecoderLayer, model.layers[-1])


def token_of(tokenizer: Tokenizer, word: str) -> int:
    """Of a word that is one token."""
    (found,) = tokenizer.encode(word, add_special_tokens=False).ids
    return found


def answer_of(model: Qwen3Model, tokenizer: Tokenizer) -> torch.Tensor:
    """The head's row of "yes" less its row of "no": float32 [hidden]."""
    weight = model.embed_tokens.weight
    return weight[token_of(tokenizer, "yes")] - weight[token_of(tokenizer, "no")]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> tuple[list[list[int]], list[int]]:
    """Token ids behind the system prompt and the instruction, which all share; and those."""
    return split_prefix(tokenizer.encode(pairs).ids)


def answers_of(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> torch.Tensor:
    """Logit of "yes" minus logit of "no": float32 [pairs]."""
    rows, shared = encode_pairs(pairs, tokenizer)
    with torch.autocast("cpu", torch.bfloat16, enabled=model.training):
        states = last_states(model, rows, shared)
    return states @ answer_of(model, tokenizer.tokenizer)
