"""Random descendants, each in its own library and in every way that embedport runs it.

The examples are the same in every run. More of them, and others:

    EMBEDPORT_RANDOM=100 EMBEDPORT_RANDOM_SEED=7 pytest tests/pipeline/test_random.py -n0
"""

import os
import shutil
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

import embedport
from embedport.checkpoint.pipeline import POOLING_MODES
from tests.synthetic import edit

from .conftest import (
    PAIRS,
    ROLES,
    TEXTS,
    add_biases,
    change_tensors,
    end_texts_with,
    messages,
    write_json,
    write_modules,
)
from .test_matrix import DENSE, NN, PROMPTS, module

EXAMPLES = int(os.environ.get("EMBEDPORT_RANDOM", "6"))
SEED = int(os.environ.get("EMBEDPORT_RANDOM_SEED", "0"))
ODD_TEXTS = [
    *TEXTS,
    "  a \t b\r\n\n",
    "x <|im_end|> y <|endoftext|>",
    "日本語 👩‍👩‍👧 e\u0301ﬁ\0",
    "w " * 300,
]
ODD_PAIRS = [*PAIRS, ("a " * 80, "b"), (" <|im_start|>", "日本語 e\u0301"), ("ÄÖ", "w " * 300)]
CONFIGS = [
    {},
    {"is_causal": False},
    {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
]
ROPES = [
    {},
    {"rope_theta": 5000.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
        "max_position_embeddings": 512,
    },
]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'So: ' + eos_token }}{% endif %}"
)


def choose(draw, *values):
    return draw(st.sampled_from(values))


def declare_model(draw, folder):
    """Attention, rotary embedding and biases."""
    seed = draw(st.integers(0, 99))
    config = {**choose(draw, *CONFIGS), **choose(draw, *ROPES)}
    edit(folder / "config.json", rms_norm_eps=choose(draw, 1e-6, 1e-4), **config)
    if draw(st.booleans()):
        add_biases(folder, seed)


def declare_texts(draw, folder, task, chat):
    """Tokens, limits and template; `chat` is a template or None."""
    end_texts_with(folder, choose(draw, None, "<|endoftext|>", "<|im_end|>", "</think>"))
    edit(
        folder / "tokenizer_config.json",
        truncation_side=choose(draw, "left", "right"),
        split_special_tokens=draw(st.booleans()),
        padding_side=choose(draw, "left", "right"),
        model_max_length=choose(draw, None, 60, 131072),
    )
    style = None
    if chat is not None:
        style = choose(draw, "flat", "structured")
        if style == "structured":
            chat = chat.replace("m.content", "m.content[0].text")
            chat = chat.replace("'content'", "'content.0.text'")
        (folder / "chat_template.jinja").write_text(chat)
    first = messages(task, style) | {
        "do_lower_case": draw(st.booleans()),
        "max_seq_length": choose(draw, None, 50, 200),
        "processing_kwargs": {
            "chat_template": {"add_generation_prompt": draw(st.booleans())} if chat else {}
        },
    }
    write_json(folder / "sentence_bert_config.json", first)


def declare_embedder(draw, folder):
    """Pooling, Dense, Normalize and prompts; returns the prompt to encode with."""
    modes = draw(st.lists(st.sampled_from(POOLING_MODES), min_size=1, max_size=2, unique=True))
    pooling = {"embedding_dimension": 64, "pooling_mode": modes}
    pooling["include_prompt"] = draw(st.booleans())
    steps: list[Any] = [("Pooling", pooling)]
    fitting = [name for name, sizes in DENSE.items() if sizes[0][0] == 64 * len(modes)]
    dense = choose(draw, None, *fitting)
    steps += [("Dense", module(sizes)) for sizes in DENSE.get(dense, ())]
    for _ in range(draw(st.integers(0, 1))):
        steps.insert(draw(st.integers(1, len(steps))), ("Normalize", {}))
    shutil.rmtree(folder / "1_Pooling")
    write_modules(folder, steps)
    prompts = choose(draw, {}, PROMPTS, {**PROMPTS, "document": "Text: "})
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "prompts": prompts,
            "default_prompt_name": choose(draw, None, "own") if prompts else None,
            "truncate_dim": choose(draw, None, 24),
        },
    )
    declare_texts(draw, folder, "feature-extraction", choose(draw, None, None, CHAT))
    return choose(draw, None, "query", "document", *prompts)


def declare_reranker(draw, folder):
    """LogitScore with one or two tokens, or a classifier of one or two labels."""
    rows = draw(st.integers(1, 2))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    activations = [None, "torch.nn.Identity", f"{NN}.Sigmoid"]
    if choose(draw, "logits", "labels") == "logits":
        tokens = draw(st.lists(st.integers(0, 999), min_size=2, max_size=2, unique=True))
        answers = {"true_token_id": tokens[0], "false_token_id": [None, tokens[1]][rows - 1]}
        write_modules(folder, [("LogitScore", answers)])
        declare_texts(draw, folder, "text-generation", choose(draw, None, ROLES))
    else:
        score = generator.standard_normal((rows, 64)).astype(np.float32)
        change_tensors(folder, lambda tensors: tensors.update({"score.weight": score}))
        edit(
            folder / "config.json",
            architectures=["Qwen3ForSequenceClassification"],
            id2label={str(row): str(row) for row in range(rows)},
            pad_token_id=Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(
                "<|endoftext|>"
            ),
        )
        activations = activations[: 4 - rows]  # two labels have no Sigmoid
        write_modules(folder, [])
        declare_texts(draw, folder, "sequence-classification", choose(draw, None, ROLES))
    prompted = draw(st.booleans())
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "model_type": "CrossEncoder",
            "prompts": {"own": "Judge it: "} if prompted else {},
            "default_prompt_name": "own" if prompted else None,
            "activation_fn": choose(draw, *activations),
        },
    )


def expected_vectors(folder, prompt):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu")
    if prompt in ("query", "document"):
        encode = {"query": model.encode_query, "document": model.encode_document}[prompt]
        return encode(ODD_TEXTS, batch_size=5)
    return model.encode(ODD_TEXTS, prompt_name=prompt, batch_size=5)


def expected_scores(folder):
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(folder), device="cpu")
    if model.num_labels == 2:
        return model.predict(ODD_PAIRS, apply_softmax=True)[:, 1]
    return model.predict(ODD_PAIRS, batch_size=3)


@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_random_descendants(bases, tmp_path_factory, data):
    draw = data.draw
    task = draw(st.sampled_from(["embedding", "reranker"]), "task")
    place = tmp_path_factory.getbasetemp() / "random"
    shutil.rmtree(place, ignore_errors=True)
    folder = shutil.copytree(bases(task), place / "model")
    declare_model(draw, folder)
    options: dict[str, Any] = {"dialect": choose(draw, "ort", "standard")}
    if task == "embedding":
        prompt = declare_embedder(draw, folder)
        options["outputs"] = choose(draw, "pooled", "hidden")
        expected = expected_vectors(folder, prompt)
    else:
        declare_reranker(draw, folder)
        expected = expected_scores(folder)
    embedport.export(folder, place / "artifact", **options)
    for source in (folder, place / "artifact"):
        model = embedport.load(source, device="cpu")
        if isinstance(model, embedport.Embedder):
            found = model.encode(ODD_TEXTS, prompt=prompt)
        else:
            found = model.score(ODD_PAIRS)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1, np.abs(expected).max()))
