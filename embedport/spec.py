"""ModelSpec: everything about a Qwen3 embedding or reranker checkpoint that the rest needs.

Read from the checkpoint's own files (config.json, tokenizer.json, tokenizer_config.json and, where
present, modules.json, 1_Pooling/config.json, config_sentence_transformers.json,
sentence_bert_config.json). Values that this project does not implement are refused, not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .errors import CheckpointError, InputError
from .files import load_json, read_json, tensor_names
from .hub import Source, fetch
from .stored import LibraryQuantization, StoredQuantization, read_quantization

Task = Literal["embedding", "reranker"]
TASKS: tuple[Task, ...] = ("embedding", "reranker")
# Of weights that are to be added to the checkpoint's.
ADAPTER = "adapter_config.json"

# Model card: https://huggingface.co/Qwen/Qwen3-Embedding-0.6B (config_sentence_transformers.json).
DEFAULT_PROMPTS = {
    "query": (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:"
    ),
    "document": "",
}


@dataclass(frozen=True)
class ModelSpec:
    """What a checkpoint is.

    Attributes:
        source: Where it came from: id, commit of the hub, folder.
        task: "embedding" (text to vector) or "reranker" (pair of texts to probability).
        hidden_size: Width of the residual stream, and of the full embedding.
        num_layers: Number of decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: Width of one head. Not hidden_size / num_heads in general.
        intermediate_size: Width of the SwiGLU.
        vocab_size: Rows of the embedding table.
        max_position_embeddings: Positions that the rotary embedding was trained for.
        rope_theta: Base of the rotary embedding.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        tied: Whether lm_head is the embedding table.
        max_length: Tokens after which a text is cut, by default.
        prompts: Prompt name to the text put before an input; embeddings only.
        quantization: How the projections are stored, if the checkpoint is quantized already.
        score_rows: Of a reranker in the sequence-classification form: rows of its head, 1 (yes) or
            2 (no, yes); None where the head is a vocabulary's.
    """

    source: Source
    task: Task
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    max_length: int
    prompts: Mapping[str, str]
    quantization: StoredQuantization | LibraryQuantization | None = None
    score_rows: int | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        revision: str | None = None,
        task: Task | None = None,
    ) -> ModelSpec:
        """Read the spec of a checkpoint; of a hub id only the configuration is downloaded.

        Args:
            checkpoint: A folder in the hub's layout, or a hub id.
            revision: A branch, tag or commit, for a hub id.
            task: Needed only for a checkpoint whose files do not tell.

        Raises:
            InputError: No such folder or hub id.
            CheckpointError: It is not a Qwen3 checkpoint, or uses what is not supported.
        """
        return read_spec(fetch(checkpoint, revision, weights=False), task)

    @property
    def parameters(self) -> int:
        """The number of weights, a tied lm_head counted once."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    @property
    def head(self) -> str:
        """The tensor that holds a reranker's head."""
        if self.score_rows is not None:
            return "score.weight"
        return "embed_tokens.weight" if self.tied else "lm_head.weight"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name (in the `Qwen3Model` form, without "model.") to shape of every tensor needed."""
        hidden, wide = self.hidden_size, self.intermediate_size
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (self.vocab_size, hidden)}
        for layer in range(self.num_layers):
            shapes |= {
                f"layers.{layer}.{name}.weight": shape
                for name, shape in {
                    "input_layernorm": (hidden,),
                    "self_attn.q_proj": (q, hidden),
                    "self_attn.k_proj": (kv, hidden),
                    "self_attn.v_proj": (kv, hidden),
                    "self_attn.q_norm": (self.head_dim,),
                    "self_attn.k_norm": (self.head_dim,),
                    "self_attn.o_proj": (hidden, q),
                    "post_attention_layernorm": (hidden,),
                    "mlp.gate_proj": (wide, hidden),
                    "mlp.up_proj": (wide, hidden),
                    "mlp.down_proj": (hidden, wide),
                }.items()
            }
        shapes["norm.weight"] = (hidden,)
        if self.task == "reranker":
            shapes[self.head] = (self.score_rows or self.vocab_size, hidden)
        return shapes


class _Config:
    """A JSON file read strictly: each error names the file, the key and what was found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = read_json(path)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: {key} is missing")
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise CheckpointError(f"{self.path}: {key} should be {kind.__name__}, found {value!r}")
        if kind in (int, float) and value <= 0:
            raise CheckpointError(f"{self.path}: {key} should be positive, found {value!r}")
        return value

    def refuse(self, key: str, *accepted: object) -> None:
        """Raise unless the value is absent, null or one of `accepted`."""
        value = self.values.get(key)
        if value is not None and value not in accepted:
            expected = " or ".join(repr(each) for each in accepted) or "absent"
            raise CheckpointError(
                f"{self.path}: {key} is {value!r}, and only {expected} is supported"
            )


def read_spec(source: Source, task: Task | None = None) -> ModelSpec:
    """Read the spec of a checkpoint that is on this disk; see `ModelSpec.from_checkpoint`."""
    if task is not None and task not in TASKS:
        raise InputError(f"task should be one of {', '.join(TASKS)}, found {task!r}")
    folder = source.folder
    if (adapter := folder / ADAPTER).exists():
        raise CheckpointError(
            f"{adapter}: an adapter is not applied; merge it into the weights first"
        )
    config = _Config(folder / "config.json")
    model_type = config.values.get("model_type")
    if model_type != "qwen3":
        raise CheckpointError(f"{config.path}: model_type should be 'qwen3', found {model_type!r}")
    config.refuse("hidden_act", "silu")
    config.refuse("attention_bias", False)
    config.refuse("use_sliding_window", False)
    if config.values.get("auto_map"):
        raise CheckpointError(
            f"{config.path}: auto_map names code of the checkpoint's own, "
            f"{config.values['auto_map']!r}, which is never run: what is computed without it would "
            "be another model"
        )
    heads = config.get("num_attention_heads", int)
    kv_heads = config.get("num_key_value_heads", int, heads)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads ({heads}) should be a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
    hidden = config.get("hidden_size", int)
    head_dim = config.get("head_dim", int, hidden // heads)
    if head_dim % 16:
        raise CheckpointError(
            f"{config.path}: head_dim should be a multiple of 16, found {head_dim}"
        )
    positions = config.get("max_position_embeddings", int)
    modules = _read_modules(folder)
    task = task or _find_task(folder, config, modules)
    return ModelSpec(
        source=source,
        task=task,
        hidden_size=hidden,
        num_layers=config.get("num_hidden_layers", int),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=config.get("intermediate_size", int),
        vocab_size=config.get("vocab_size", int),
        max_position_embeddings=positions,
        rope_theta=_read_rope_theta(config),
        rms_norm_eps=config.get("rms_norm_eps", float),
        tied=config.get("tie_word_embeddings", bool, False),
        max_length=_read_max_length(folder, positions),
        prompts=_read_prompts(folder),
        quantization=read_quantization(config.values.get("quantization_config"), config.path),
        score_rows=_read_score_rows(config) if task == "reranker" else None,
    )


def _read_score_rows(config: _Config) -> int | None:
    if config.values.get("architectures") != ["Qwen3ForSequenceClassification"]:
        return None
    # transformers' default is two labels.
    labels = config.values.get("id2label") or {}
    rows = config.get("num_labels", int, len(labels) or 2)
    if rows not in (1, 2):
        raise CheckpointError(
            f"{config.path}: a reranker should have one label, yes, or two, no and yes; found "
            f"{rows}: {labels!r}"
        )
    return rows


def _read_rope_theta(config: _Config) -> float:
    # transformers 5 writes rope_parameters, earlier versions rope_theta and rope_scaling.
    parameters = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise CheckpointError(
            f"{config.path}: rope_parameters should be an object, found {parameters!r}"
        )
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"{config.path}: rotary embedding of type {kind!r} is not supported, only 'default'"
        )
    return config.get("rope_theta", float, parameters.get("rope_theta"))


def _read_modules(folder: Path) -> list[str]:
    """The class names in sentence-transformers' modules.json; none when there is no such file."""
    path = folder / "modules.json"
    if not path.exists():
        return []
    try:
        modules = load_json(path)
        names = [str(module["type"]).rpartition(".")[2] for module in modules]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a list of modules: {error}") from error
    unknown = set(names) - {"Transformer", "Pooling", "Normalize", "LogitScore"}
    if unknown:
        raise CheckpointError(f"{path}: module {sorted(unknown)[0]} is not supported")
    if "Pooling" in names:
        _check_pooling(folder / "1_Pooling" / "config.json")
    return names


def _check_pooling(path: Path) -> None:
    values = read_json(path)
    if "pooling_mode" in values:
        modes = [values["pooling_mode"]]
    else:
        modes = [
            key.removeprefix("pooling_mode_")
            for key, value in values.items()
            if key.startswith("pooling_mode_") and value
        ]
    if modes != ["lasttoken"]:
        raise CheckpointError(f"{path}: pooling should be lasttoken, found {', '.join(modes)}")


def _find_task(folder: Path, config: _Config, modules: list[str]) -> Task:
    if "Pooling" in modules:
        return "embedding"
    if "LogitScore" in modules:
        return "reranker"
    # Without modules.json the class tells: embedding checkpoints hold a bare Qwen3Model.
    bare = "embed_tokens.weight" in tensor_names(folder)
    return (
        "embedding" if bare or config.values.get("architectures") == ["Qwen3Model"] else "reranker"
    )


def _read_max_length(folder: Path, positions: int) -> int:
    lengths = [positions]
    for name, key in (
        ("tokenizer_config.json", "model_max_length"),
        ("sentence_bert_config.json", "max_seq_length"),
    ):
        path = folder / name
        # transformers writes 1e30 for "no limit": any number may stand here.
        value = read_json(path).get(key) if path.exists() else None
        if isinstance(value, int | float) and value >= 1:
            lengths.append(int(min(value, positions)))
    return min(lengths)


def _read_prompts(folder: Path) -> dict[str, str]:
    path = folder / "config_sentence_transformers.json"
    prompts = read_json(path).get("prompts") if path.exists() else None
    if not prompts:
        return dict(DEFAULT_PROMPTS)
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{path}: prompts should map names to texts, found {prompts!r}")
    return {"document": "", **prompts}
