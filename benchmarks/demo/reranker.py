"""The reranker, which is trained in two stages.

Gradient descent on "yes" and "no" alone hardly discovers how to compare two texts. So the model
starts as the embedder with one more layer.

1. `places`: in the text of a pair, the model learns to produce the embedder's vector of the query
   right after the query and that of the document right after the document, and to mark these two
   places. It also learns the embedder's states at the tokens of both texts: there are many of them,
   and they show which tokens belong together.
2. `joining`: the last layer's weights are set to fetch both vectors and add their inner product to
   the logit of "yes".
3. `answers`: all weights are trained on the embedder's own top candidates. Pairs that are new to
   the embedder are trained on the truth and the teacher's opinion, others on an opinion alone. The
   result is the mean of the model before and after this stage, which ranks slightly better than
   either (Wortsman et al., "Robust fine-tuning of zero-shot models", 2022).

Many steps with few pairs teach far more per hour than few steps with many.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tokenizers import Tokenizer
from transformers import Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from embedport.texts.prompts import END_OF_TEXT, RerankerTokenizer

from .half import fast_products
from .model import last_states, make_model, split_prefix

LAYERS = 4
# Tokens right after the query and the document; their states hold the two vectors.
QUERY_PLACE, DOCUMENT_PLACE = "<Document", "</think>"
# The last coordinates of a state mark its token as the query's place, the document's, or neither.
MARKS = (-3, -2, -1)


def make_reranker(embedder: Qwen3Model, tokenizer: Tokenizer, seed: int) -> Qwen3Model:
    """The embedder with one more layer, which initially does nothing."""
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
    """The layer that the embedder does not have."""
    return cast(Qwen3DecoderLayer, model.layers[-1])


def token_of(tokenizer: Tokenizer, word: str) -> int:
    """The id of a word that is a single token."""
    (token_id,) = tokenizer.encode(word, add_special_tokens=False).ids
    return token_id


def answer_of(model: Qwen3Model, tokenizer: Tokenizer) -> torch.Tensor:
    """The head's row of "yes" minus its row of "no": float32 [hidden]."""
    weight = model.embed_tokens.weight
    return weight[token_of(tokenizer, "yes")] - weight[token_of(tokenizer, "no")]


def encode_pairs(
    pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> tuple[list[list[int]], list[int]]:
    """Token ids as (rows after the shared system prompt and instruction, that shared prefix)."""
    return split_prefix(tokenizer.encode(pairs).ids)


def answers_of(
    model: Qwen3Model, pairs: Sequence[tuple[str, str]], tokenizer: RerankerTokenizer
) -> torch.Tensor:
    """Logit of "yes" minus logit of "no": float32 [pairs]."""
    rows, shared = encode_pairs(pairs, tokenizer)
    with fast_products(enabled=model.training):
        states = last_states(model, rows, shared)
    return states @ answer_of(model, tokenizer.tokenizer)
