"""A sequence classifier's head and the padding it skips; the activation of a reranker's score."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..strict_json import read_optional_json
from .adapter import Adapter
from .keys import shown
from .modules import Modules, read_activation
from .pipeline import Activation
from .settings import Settings
from .tokenizer import load_tokenizer
from .tokens import TOKENIZER_CONFIG, special_tokens

CLASSIFIER = "Qwen3ForSequenceClassification"


def read_score_rows(
    config: Settings, modules: Modules | None, adapter: Adapter | None
) -> int | None:
    """Rows of a sequence classifier's head; None if the model is not one.

    Args:
        config: The base's config.json.
        modules: The sentence-transformers modules, if the folder has them.
        adapter: The adapter, which may have a head of its own.

    Raises:
        CheckpointError: The rows are neither 1 nor 2, or the file contradicts itself.
    """
    if modules is not None and not modules.classifier:
        return None
    if adapter is not None and adapter.labels is not None:
        if adapter.labels not in (1, 2):
            raise CheckpointError(
                f"{adapter.folder}: score.weight should have one row, yes, or two, no and yes; "
                f"found {adapter.labels}"
            )
        return adapter.labels
    if config.values.get("architectures") != [CLASSIFIER]:
        # sentence-transformers gives other classes one label.
        return None if modules is None else 1
    labels, count = config.values.get("id2label"), config.values.get("num_labels")
    if not isinstance(labels, dict | None):
        raise CheckpointError(f"{config.path}: id2label should be an object, found {shown(labels)}")
    if labels is not None and count not in (None, len(labels)):
        raise CheckpointError(
            f"{config.path}: num_labels is {count!r} and id2label has {len(labels)} labels; "
            "transformers 5 reads the first and 4 the second: take out the one that is wrong"
        )
    # transformers' default is two labels.
    rows = config.get("num_labels", int, 2) if labels is None else len(labels)
    if rows not in (1, 2):
        raise CheckpointError(
            f"{config.path}: a reranker should have one label, yes, or two, no and yes; found "
            f"{rows}: {labels!r}"
        )
    return rows


def read_skipped_token(config: Settings, folder: Path) -> int | None:
    """The token that a sequence classifier skips at the end of its input; None if it skips none.

    Args:
        config: The base's config.json.
        folder: The folder with the tokenizer.

    Raises:
        CheckpointError: The tokenizer pads on the right with another token. transformers would
            read that padding, and a score would depend on the batch.
    """
    skipped = config.values.get("pad_token_id")
    if not isinstance(skipped, int):
        return None
    path = folder / TOKENIZER_CONFIG
    padding = special_tokens(folder)[0].get("pad_token")
    if padding is None or read_optional_json(path).get("padding_side") == "left":
        return skipped
    actual = load_tokenizer(folder / "tokenizer.json").token_to_id(padding)
    if actual not in (None, skipped):
        raise CheckpointError(
            f"{config.path}: pad_token_id should be {actual}, the id of {padding!r} with which "
            f"{path} pads on the right, found {skipped}: transformers would score a pair by its "
            "padding, and differently in each batch; correct one of them, or give padding_side "
            "left there if single pairs are scored rightly"
        )
    return skipped


def read_score_activation(
    rows: int, config: Settings, modules: Modules | None, folder: Path
) -> Activation:
    """The activation of a reranker's score, Sigmoid by default.

    With two labels the score is the probability of the second: the sigmoid of the difference.

    Args:
        rows: Rows of a classifier's head; 1 of another reranker.
        config: The base's config.json.
        modules: The sentence-transformers modules, if the folder has them.
        folder: The folder with the modules, for errors.

    Raises:
        CheckpointError: The activation is not supported.
    """
    declared = _declared_activation(config, modules)
    if rows == 1:
        return declared or "sigmoid"
    if declared == "sigmoid":
        raise CheckpointError(
            f"{folder}: a Sigmoid for each of two labels is not supported; take "
            "activation_fn out if the labels exclude each other, which a softmax then compares"
        )
    return "sigmoid"


def _declared_activation(config: Settings, modules: Modules | None) -> Activation | None:
    """The activation that CrossEncoder reads: of its own settings, else of config.json."""
    if modules is not None and modules.activation is not None:
        return modules.activation
    nested = config.values.get("sentence_transformers")
    if isinstance(nested, dict) and "activation_fn" in nested:
        name = nested["activation_fn"]
        where = f"{config.path}: activation_fn of sentence_transformers"
    else:
        key = "sbert_ce_default_activation_function"
        name, where = config.values.get(key), f"{config.path}: {key}"
    return None if name is None else read_activation(name, where)
