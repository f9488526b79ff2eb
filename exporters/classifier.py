"""A reranker's files as libraries read a sequence classifier with one label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..artifact.layout import turn_into_classifier, write_json
from ..checkpoint.classifier import CLASSIFIER
from ..checkpoint.spec import ModelSpec
from ..checkpoint.tokens import special_tokens
from ..strict_json import load_json
from ..texts.prompts import (
    DEFAULT_INSTRUCTION,
    END_OF_TEXT,
    RERANKER_PREFIX,
    RERANKER_SUFFIX,
    load_tokenizer,
    token_id,
)

TEMPLATE = "chat_template.jinja"


def write_classifier(spec: ModelSpec, folder: Path) -> None:
    """Make a reranker's copied files those of a classifier with one label.

    sentence-transformers' CrossEncoder and optimum's ORTModelForSequenceClassification read them.

    Args:
        spec: The reranker.
        folder: The folder that `write_companions` has written to.
    """
    config = load_json(folder / "config.json")
    write_json(folder / "config.json", config | classifier_values(spec))
    turn_into_classifier(folder)
    if spec.inputs.form == "instruct":
        (folder / TEMPLATE).write_bytes(pair_template().encode())


def classifier_values(spec: ModelSpec) -> dict[str, Any]:
    """The settings in config.json of a classifier whose logit is W_yes - W_no."""
    path = spec.source.pipeline / "tokenizer.json"
    padding = spec.inputs.skipped_token
    if padding is None and spec.score_rows is None:
        # What the tokenizer pads with; CrossEncoder takes the place before it for the pair's end.
        name = special_tokens(path.parent)[0].get("pad_token", END_OF_TEXT)
        padding = token_id(load_tokenizer(path), name, path)
    activation = "activation.Sigmoid" if spec.outputs.activation == "sigmoid" else "linear.Identity"
    return {
        "architectures": [CLASSIFIER],
        "num_labels": 1,
        "id2label": {"0": "yes"},
        "label2id": {"yes": 0},
        "pad_token_id": padding,
        "sentence_transformers": {"activation_fn": f"torch.nn.modules.{activation}"},
    }


def pair_template() -> str:
    """The jinja template that joins two messages, of the roles "query" and "document".

    sentence-transformers' CrossEncoder and vLLM's score and rerank (`--chat-template`) render it; a
    message of the role "system" replaces the instruction. Strings are written as expressions, so
    that no renderer trims their line breaks.
    """

    def message(role: str) -> str:
        return f"messages | selectattr('role', 'eq', '{role}') | map(attribute='content') | first"

    def text(value: str) -> str:
        return "{{- " + json.dumps(value) + " -}}\n"

    return (
        text(RERANKER_PREFIX + "<Instruct>: ")
        + f"{{{{- {message('system')} | default({json.dumps(DEFAULT_INSTRUCTION)}, true) -}}}}\n"
        + text("\n<Query>: ")
        + f"{{{{- {message('query')} -}}}}\n"
        + text("\n<Document>: ")
        + f"{{{{- {message('document')} -}}}}\n"
        + text(RERANKER_SUFFIX).rstrip("\n")
    )
