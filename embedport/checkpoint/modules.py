"""sentence-transformers' files beside a checkpoint, read strictly into Inputs and Outputs.

modules.json lists the modules, config_sentence_transformers.json has the prompts, and each module's
folder has a config.json; the first module's is sentence_bert_config.json. Modules and settings that
are not implemented are refused; `keys` lists the keys that do not affect results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from ..errors import CheckpointError
from ..files import is_file_name
from ..strict_json import load_json, read_optional_json
from .chat import has_template, infer_format
from .keys import (
    LOADING_NOTES,
    SENTENCE_TRANSFORMERS_NOTES,
    TRANSFORMER_NOTES,
    refuse_unknown,
    shown,
)
from .pipeline import (
    ACTIVATIONS,
    POOLING_MODES,
    ROLES,
    Activation,
    Dense,
    Form,
    Inputs,
    MessageFormat,
    Outputs,
    PoolingMode,
    Step,
)
from .settings import Settings

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
# The same file's names in early versions.
EARLY = tuple(
    f"sentence_{name}_config.json"
    for name in ("roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
Kind = Literal["SentenceTransformer", "CrossEncoder"]
# transformer_task of the first module, to (method_output_name, module_output_name).
TASKS = {
    "feature-extraction": ("last_hidden_state", "token_embeddings"),
    "text-generation": ("logits", "causal_logits"),
    "sequence-classification": ("logits", "scores"),
}
# Keys of a Transformer with options of loading its model.
LOADING = tuple(
    f"{part}_{kind}"
    for part in ("model", "processor", "tokenizer", "config")
    for kind in ("args", "kwargs")
)
# Keys of early versions, in the order in which several poolings are concatenated.
EARLY_POOLING: dict[str, PoolingMode] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
# Arguments of apply_chat_template that are not template variables.
NOT_VALUES = frozenset(
    [
        "chat_template",
        "continue_final_message",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_dict",
        "restore_suffix",
        "return_assistant_tokens_mask",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    ]
)


@dataclass(frozen=True)
class Modules:
    """A folder's sentence-transformers modules.

    Attributes:
        kind: "SentenceTransformer" or "CrossEncoder".
        inputs: How inputs become tokens.
        outputs: How the last layer's hidden states become vectors or scores.
        classifier: Whether the model is a sequence classifier.
        activation: Applied to a CrossEncoder's score; None if its settings do not say.
        max_length: Maximum tokens of a text; None if the tokenizer's own limit applies.
    """

    kind: Kind
    inputs: Inputs
    outputs: Outputs
    classifier: bool
    activation: Activation | None
    max_length: int | None


def read_modules(folder: Path, hidden_size: int) -> Modules | None:
    """Read a folder's modules; None if it has no modules.json.

    Args:
        folder: The checkpoint's folder.
        hidden_size: Width of a hidden state.

    Raises:
        CheckpointError: A file is damaged, or asks for an unsupported feature.
    """
    path = folder / MODULES
    if not path.exists():
        return None
    entries = _read_entries(path)
    settings = _read_settings(folder)
    kind: Kind = settings.values.get("model_type") or "SentenceTransformer"
    names = [name for name, _ in entries[1:]]
    modules = [_read_file(place / "config.json") for _, place in entries[1:]]
    first = _read_transformer(folder)
    task = first.values.get("transformer_task") or "feature-extraction"
    if not isinstance(task, str) or task not in TASKS:
        raise CheckpointError(
            f"{first.path}: transformer_task should be one of {', '.join(TASKS)}, found {task!r}"
        )
    inputs = _read_inputs(folder, first, task, settings, is_pair=kind == "CrossEncoder")
    max_length = _optional_integer(first, "max_seq_length")
    _check_order(path, names, task, kind)
    activation = None
    if kind == "SentenceTransformer":
        outputs = _read_vectors(names, modules, settings, hidden_size)
    else:
        activation = _read_activation(settings)
        answers = _read_answers(modules[0]) if modules else None
        outputs = Outputs(steps=(), answers=answers)
    return Modules(kind, inputs, outputs, task == "sequence-classification", activation, max_length)


def refuse_transformer_elsewhere(folder: Path) -> None:
    """Refuse a modules.json whose first module is no Transformer in the folder itself.

    Raises:
        CheckpointError: It is another module, or in a folder of its own, as of early versions.
    """
    path = folder / MODULES
    if not path.exists():
        return
    name, place = _read_entries(path)[0]
    if name != "Transformer" or place != folder:
        raise CheckpointError(
            f"{path}: the first module should be a Transformer with the path '', found {name} in "
            f"{place.name!r}; move the files of a Transformer up and change its path"
        )


def _read_entries(path: Path) -> list[tuple[str, Path]]:
    """(class, folder) of each module."""
    try:
        entries = load_json(path)
        types = [(str(entry["type"]), str(entry["path"])) for entry in entries]
        names = [str(entry["name"]) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error}") from error
    if len(set(names)) < len(names):
        raise CheckpointError(f"{path}: each module should have a unique name, found {names}")
    modules = []
    for kind, place in types:
        name = kind.rpartition(".")[2]
        if not kind.startswith("sentence_transformers."):
            raise CheckpointError(
                f"{path}: module {kind} is code of the checkpoint's own, which is never run"
            )
        if name not in ("Transformer", "Pooling", "Dense", "Normalize", "Dropout", "LogitScore"):
            raise CheckpointError(
                f"{path}: module {name} is not supported, only Transformer, Pooling, Dense, "
                "Normalize, Dropout and LogitScore are"
            )
        parts = PurePosixPath(place).parts
        if len(parts) > 1 or not all(map(is_file_name, parts)):
            raise CheckpointError(f"{path}: {shown(place)} should be a folder beside the file")
        if name != "Dropout":  # has no effect after training
            modules.append((name, path.parent / place))
    if not modules:
        raise CheckpointError(f"{path} names no module")
    return modules


def _read_file(path: Path) -> Settings:
    return Settings(path, read_optional_json(path))


def _optional_integer(settings: Settings, key: str) -> int | None:
    """A positive integer; None if the value is absent or null."""
    return None if settings.values.get(key) is None else settings.get(key, int)


def _check_order(path: Path, names: Sequence[str], task: str, kind: Kind) -> None:
    """Check which modules follow the Transformer, and that its task goes with them."""
    if kind == "SentenceTransformer":
        fits = names[:1] == ["Pooling"] and {*names[1:]} <= {"Dense", "Normalize"}
        followers, expected = "Pooling, and then Dense and Normalize", "feature-extraction"
    else:
        fits = names in ([], ["LogitScore"])
        followers = "LogitScore, or nothing for a sequence-classification"
        expected = "text-generation" if names else "sequence-classification"
    if not fits:
        raise CheckpointError(
            f"{path}: the Transformer of a {kind} should be followed by {followers}; found "
            f"{', '.join(names) or 'nothing'}"
        )
    if task != expected:
        raise CheckpointError(
            f"{path.parent / TRANSFORMER}: transformer_task should be {expected!r} with these "
            f"modules, found {task!r}"
        )


def _read_settings(folder: Path) -> Settings:
    settings = _read_file(folder / SETTINGS)
    read = (
        "activation_fn",
        "default_prompt_name",
        "model_type",
        "prompts",
        "similarity_fn_name",
        "truncate_dim",
    )
    refuse_unknown(settings.values, settings.path, read, SENTENCE_TRANSFORMERS_NOTES)
    settings.refuse("model_type", *get_args(Kind))
    return settings


def _read_transformer(folder: Path) -> Settings:
    for name in EARLY:
        if (folder / name).exists() and not (folder / TRANSFORMER).exists():
            raise CheckpointError(f"{folder / name}: name it {TRANSFORMER}: no other is read")
    first = _read_file(folder / TRANSFORMER)
    read = (
        "do_lower_case",
        "max_seq_length",
        "modality_config",
        "module_output_name",
        "processing_kwargs",
        "transformer_task",
        *LOADING,
    )
    refuse_unknown(first.values, first.path, read, TRANSFORMER_NOTES)
    for key in LOADING:
        values = first.values.get(key) or {}
        if not isinstance(values, dict):
            raise CheckpointError(f"{first.path}: {key} should be an object, found {values!r}")
        for name, value in values.items():
            if name not in LOADING_NOTES and value is not None:
                raise CheckpointError(
                    f"{first.path}: {key} sets {name} to {shown(value)}, which is not supported"
                )
    return first


def _read_inputs(
    folder: Path, first: Settings, task: str, settings: Settings, *, is_pair: bool
) -> Inputs:
    form, message_format = _read_modalities(folder, first, task)
    prompts, default = _read_prompts(settings, () if is_pair else ROLES)
    return Inputs(
        form=form,
        prompts=prompts,
        default_prompt=default,
        lower_case=first.get("do_lower_case", bool, False),
        message_format=message_format,
        template_values=_read_template_values(first),
    )


def _read_modalities(folder: Path, first: Settings, task: str) -> tuple[Form, MessageFormat]:
    method_output, output = TASKS[task]
    first.refuse("module_output_name", output)
    modalities = first.values.get("modality_config")
    if modalities is None:
        return "text", "flat"
    where = f"{first.path}: modality_config"
    if not isinstance(modalities, dict):
        raise CheckpointError(f"{where} should be an object, found {shown(modalities)}")
    for name, entry in modalities.items():
        if name not in ("text", "message"):
            raise CheckpointError(f"{where}: {name} is not supported, only text and message are")
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where}: {name} should be an object, found {shown(entry)}")
        entry_output = (entry.get("method"), entry.get("method_output_name"))
        if entry_output != ("forward", method_output):
            raise CheckpointError(
                f"{where}: {name} should take {method_output!r} of 'forward', found "
                f"{entry_output[1]!r} of {entry_output[0]!r}"
            )
    if "text" not in modalities:
        raise CheckpointError(
            f"{where} should have text, without which sentence-transformers takes no plain texts; "
            f"found {', '.join(modalities) or 'none'}"
        )
    if "message" not in modalities:
        return "text", "flat"
    style = modalities["message"].get("format", "auto")
    if style == "auto":
        style = infer_format(folder)
    if style not in get_args(MessageFormat):
        raise CheckpointError(
            f"{where}: the format of message should be one of auto, "
            f"{', '.join(get_args(MessageFormat))}, found {style!r}"
        )
    if not has_template(folder):
        raise CheckpointError(f"{where} has message, and the folder has no chat template")
    return "messages", style


def _read_template_values(first: Settings) -> dict[str, Any]:
    settings = first.values.get("processing_kwargs") or {}
    where = f"{first.path}: processing_kwargs"
    if not isinstance(settings, dict):
        raise CheckpointError(f"{where} should be an object, found {shown(settings)}")
    for key, value in settings.items():
        if key != "chat_template" and value:
            raise CheckpointError(f"{where}: {key} is not supported, only chat_template is")
    values = settings.get("chat_template") or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{where}: chat_template should be an object, found {shown(values)}")
    for key in values:
        if key in NOT_VALUES:
            raise CheckpointError(f"{where}: {key} of chat_template is not supported")
    return values


def read_prompts(folder: Path) -> tuple[dict[str, str], str | None]:
    """The prompts of a folder without modules.json, and the name of the default one.

    Raises:
        CheckpointError: They do not map names to texts.
    """
    return _read_prompts(_read_file(folder / SETTINGS), ROLES)


def refuse_lone_pooling(folder: Path, hidden_size: int) -> None:
    """Refuse a pooling that no modules.json names, unless it is the model card's: the last token.

    Raises:
        CheckpointError: The folder has such a pooling.
    """
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return
    modes, _ = _read_pooling(_read_file(path), hidden_size)
    if modes != ("lasttoken",):
        raise CheckpointError(
            f"{path} has the pooling {', '.join(modes)}, but there is no {MODULES} to name it, and "
            f"without one a vector is the last token's: put {MODULES} beside config.json, as "
            "sentence-transformers writes it, or take the pooling out"
        )


def _read_prompts(settings: Settings, roles: Sequence[str]) -> tuple[dict[str, str], str | None]:
    texts = settings.values.get("prompts") or {}
    if not isinstance(texts, dict) or not all(
        isinstance(prompt, str | None) for prompt in texts.values()
    ):
        raise CheckpointError(
            f"{settings.path}: prompts should map names to texts, found {shown(texts)}"
        )
    prompts = {name: prompt or "" for name, prompt in texts.items()}
    default = settings.values.get("default_prompt_name")
    if default is not None and default not in (*prompts, *roles):
        raise CheckpointError(
            f"{settings.path}: default_prompt_name is {default!r}, and the prompts are "
            f"{', '.join(prompts) or 'none'}"
        )
    return prompts, default


def _read_vectors(
    names: Sequence[str], modules: Sequence[Settings], settings: Settings, hidden_size: int
) -> Outputs:
    modes, include_prompt = _read_pooling(modules[0], hidden_size)
    settings.refuse("activation_fn")
    settings.refuse("similarity_fn_name", *SIMILARITIES)
    steps: list[Step] = []
    width = hidden_size * len(modes)
    for name, module in zip(names[1:], modules[1:], strict=True):
        if name == "Dense":
            dense = _read_dense(module, width)
            steps.append(dense)
            width = dense.out_features
        else:
            _check_normalize(module)
            steps.append("normalize")
    return Outputs(
        pooling=modes,
        include_prompt=include_prompt,
        steps=tuple(steps),
        truncate=_optional_integer(settings, "truncate_dim"),
        similarity=settings.values.get("similarity_fn_name") or "cosine",
    )


def _read_pooling(module: Settings, hidden_size: int) -> tuple[tuple[PoolingMode, ...], bool]:
    sizes = ("word_embedding_dimension", "embedding_dimension")
    read = (*sizes, "pooling_mode", "include_prompt", *EARLY_POOLING)
    refuse_unknown(module.values, module.path, read)
    for key in sizes:
        module.refuse(key, hidden_size)
    if all(module.values.get(key) is None for key in sizes):
        raise CheckpointError(f"{module.path}: {sizes[1]} should be {hidden_size}, found none")
    modes = module.values.get("pooling_mode")
    if modes is None:
        # Without any of these keys the default is the mean.
        modes = [mode for key, mode in EARLY_POOLING.items() if module.get(key, bool, False)]
        modes = modes or ["mean"]
    elif isinstance(modes, str):
        modes = [modes]
    is_list = isinstance(modes, list) and bool(modes)
    if not is_list or any(mode not in POOLING_MODES for mode in modes):
        raise CheckpointError(
            f"{module.path}: pooling_mode should be one or more of {', '.join(POOLING_MODES)}, "
            f"found {shown(modes)}"
        )
    return tuple(modes), module.get("include_prompt", bool, True)


def _check_normalize(module: Settings) -> None:
    _check_tensors(module)
    refuse_unknown(module.values, module.path, ("module_input_name", "module_output_name"))


def _read_dense(module: Settings, width: int) -> Dense:
    _check_tensors(module)
    read = (
        "in_features",
        "out_features",
        "bias",
        "activation_function",
        "module_input_name",
        "module_output_name",
        "use_residual",
    )
    refuse_unknown(module.values, module.path, read)
    module.refuse("in_features", width)
    name = module.values.get("activation_function", "torch.nn.modules.activation.Tanh")
    activation = str(name).rpartition(".")[2]
    if not str(name).startswith("torch.") or activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{module.path}: activation_function should be one of torch.nn's "
            f"{', '.join(ACTIVATIONS)}, found {name!r}"
        )
    return Dense(
        path=module.path.parent.name,
        in_features=module.get("in_features", int),
        out_features=module.get("out_features", int),
        bias=module.get("bias", bool, True),
        activation=activation,
        residual=module.get("use_residual", bool, False),
    )


def _check_tensors(module: Settings) -> None:
    """Refuse a module that reads or writes anything but the sentence embedding."""
    for key in ("module_input_name", "module_output_name"):
        module.refuse(key, "sentence_embedding")


def _read_answers(module: Settings) -> tuple[int, int | None]:
    keys = ("true_token_id", "false_token_id", "module_input_name")
    refuse_unknown(module.values, module.path, keys)
    module.refuse("module_input_name", "causal_logits")

    def token(key: str) -> int:
        value = module.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise CheckpointError(f"{module.path}: {key} should be a token's id, found {value!r}")
        return value

    has_false = module.values.get("false_token_id") is not None
    return token("true_token_id"), token("false_token_id") if has_false else None


def _read_activation(settings: Settings) -> Activation | None:
    settings.refuse("truncate_dim")
    value = settings.values.get("activation_fn")
    return None if value is None else read_activation(value, f"{settings.path}: activation_fn")


def read_activation(value: object, where: str) -> Activation:
    """A CrossEncoder's activation from the name of its torch class.

    Args:
        value: The name.
        where: The file and the key, for the error.

    Raises:
        CheckpointError: The class is not supported.
    """
    known: dict[str, Activation] = {"Sigmoid": "sigmoid", "Identity": "identity"}
    package, _, name = str(value).rpartition(".")
    if f"{package}.".startswith("torch.nn.") and name in known:
        return known[name]
    raise CheckpointError(
        f"{where} is {shown(value)}, and only torch.nn's Sigmoid and Identity are supported"
    )
