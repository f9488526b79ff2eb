"""ModelSpec: all that the other modules need to know about a Qwen3 embedder or reranker checkpoint.

This module reads config.json; `modules` reads sentence-transformers' files, and `tokens` the
tokenizer's. A setting is either implemented, or refused with an error that names the file, the key
and the supported values: docs/checkpoint-files.md.
"""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, InputError, UndeclaredTaskError
from ..strict_json import read_json
from .adapter import CONFIG as ADAPTER
from .adapter import Adapter, Merge, read_adapter
from .chat import ChatTemplate, has_template, infer_format, read_template
from .classifier import (
    CLASSIFIER,
    read_score_activation,
    read_score_rows,
    read_skipped_token,
)
from .hub import Source, fetch
from .keys import CONFIG_NOTES, CONFIG_READ, refuse_unknown, shown
from .modelcard import declared_task
from .modules import (
    Modules,
    read_modules,
    read_prompts,
    refuse_lone_pooling,
    refuse_transformer_elsewhere,
)
from .pipeline import TASKS, Inputs, Outputs, Task
from .quantization_config import (
    CODES,
    LibraryQuantization,
    StoredQuantization,
    read_quantization,
)
from .rope import Rope, read_rope
from .settings import Settings
from .tensor_files import tensor_names
from .tokenizer import load_tokenizer
from .tokens import read_length, read_token_settings

CAUSAL_LM = "Qwen3ForCausalLM"
ARCHITECTURES = ("Qwen3Model", CAUSAL_LM, CLASSIFIER)
# Their tensors fill a header of `files.SMALL`; a larger number would only fill the memory.
MOST_LAYERS = 4096
# As much as the kernels in C have room for (MAX_WIDTH and MAX_HEAD_DIM in runtimes/kernels).
MOST_WIDTH, MOST_HEAD_DIM = 65_536, 256


@dataclass(frozen=True)
class ModelSpec:
    """A checkpoint's architecture, inputs and outputs.

    Attributes:
        source: The checkpoint's origin: id, hub commit, folder.
        task: "embedding" (text to vector) or "reranker" (pair of texts to probability).
        hidden_size: Width of the residual stream, and of the full embedding.
        num_layers: Number of decoder layers.
        num_heads: Query heads.
        num_kv_heads: Key and value heads; each serves num_heads / num_kv_heads query heads.
        head_dim: Width of one head. Not hidden_size / num_heads in general.
        intermediate_size: Width of the SwiGLU.
        vocab_size: Number of rows of the embedding table.
        max_position_embeddings: Number of positions that the model was trained for.
        rope: The rotary embedding.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        tied: Whether lm_head is the embedding table.
        max_length: Default limit in tokens; longer texts are truncated.
        causal: Whether attention is causal.
        window: Size of the sliding window in tokens, the token itself included.
        window_layers: The layers with a sliding window.
        attention_bias: Whether the attention's four projections have biases.
        inputs: How inputs become tokens.
        outputs: How the last layer's hidden states become vectors or scores.
        quantization: How the projections are stored, if the checkpoint is already quantized.
        score_rows: Rows of a sequence classifier's head: 1 (yes) or 2 (no, yes); None if a reranker
            scores with lm_head, or for an embedder.
        adapter: The adapter to merge into the weights.
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
    rope: Rope
    rms_norm_eps: float
    tied: bool
    max_length: int
    causal: bool = True
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    attention_bias: bool = False
    inputs: Inputs = field(default_factory=Inputs)
    outputs: Outputs = field(default_factory=Outputs)
    quantization: StoredQuantization | LibraryQuantization | None = None
    score_rows: int | None = None
    adapter: Adapter | None = None

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        *,
        revision: str | None = None,
        task: Task | None = None,
        adapter: str | Path | None = None,
    ) -> ModelSpec:
        """Read a checkpoint's spec. For a hub id, only the configuration is downloaded.

        Args:
            checkpoint: A folder in the hub's layout, or a hub id.
            revision: A branch, tag or commit, for a hub id.
            task: Needed only if the checkpoint's files do not state it.
            adapter: The folder or hub id of a LoRA adapter to merge into its weights.

        Raises:
            InputError: There is no such folder or hub id.
            CheckpointError: It is not a Qwen3 checkpoint, or uses an unsupported feature.

        >>> ModelSpec.from_checkpoint(checkpoint).task
        'embedding'
        """
        return read_spec(fetch(checkpoint, revision, weights=False, adapter=adapter), task)

    @property
    def parameters(self) -> int:
        """The number of weights, a tied lm_head counted once."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    @property
    def masked_layers(self) -> Sequence[int]:
        """The layers that need an attention mask: all but those with plain causal attention."""
        return self.window_layers if self.causal else range(self.num_layers)

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text that is put before an input."""
        return self.inputs.prompts

    @property
    def embedding_dim(self) -> int:
        """Width of a vector."""
        return self.outputs.width(self.hidden_size)

    @property
    def head(self) -> str:
        """Name of the tensor that holds a reranker's head."""
        if self.score_rows is not None:
            return "score.weight"
        return "embed_tokens.weight" if self.tied else "lm_head.weight"

    def plan_merge(self) -> Merge:
        """Plan the adapter's merge into the weights, which must be on disk.

        Raises:
            CheckpointError: The adapter does not fit the weights.
        """
        assert self.adapter is not None
        return self.adapter.plan(
            self.tensor_shapes(),
            embeds=self.task == "embedding",
            is_tied=self.tied and self.score_rows is None,
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The required tensors: name (as in `Qwen3Model`, without "model.") to shape."""
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
            if self.attention_bias:
                sizes = {"q_proj": q, "k_proj": kv, "v_proj": kv, "o_proj": hidden}
                shapes |= {
                    f"layers.{layer}.self_attn.{name}.bias": (size,) for name, size in sizes.items()
                }
        shapes["norm.weight"] = (hidden,)
        if self.task == "reranker":
            shapes[self.head] = (self.score_rows or self.vocab_size, hidden)
        return shapes


def read_spec(source: Source, task: Task | None = None) -> ModelSpec:
    """Read the spec of a checkpoint that is on disk; see `ModelSpec.from_checkpoint`."""
    if task is not None and task not in TASKS:
        raise InputError(f"task should be one of {', '.join(TASKS)}, found {task!r}")
    folder = source.folder
    adapter = None if source.adapter is None else read_adapter(source.adapter.folder)
    _refuse_other_adapters(source)
    refuse_transformer_elsewhere(source.pipeline)
    path = folder / "config.json"
    config = Settings(path, read_json(path))
    model_type = config.values.get("model_type")
    if model_type != "qwen3":
        raise CheckpointError(f"{config.path}: model_type should be 'qwen3', found {model_type!r}")
    if config.values.get("auto_map"):
        raise CheckpointError(
            f"{config.path}: auto_map names code of the checkpoint's own, "
            f"{config.values['auto_map']!r}, which is never run; without it this would be a "
            "different model"
        )
    refuse_unknown(config.values, config.path, CONFIG_READ, CONFIG_NOTES)
    config.refuse("hidden_act", "silu", "swish")
    layers = _read_size(config, "num_hidden_layers", MOST_LAYERS)
    causal = _read_causal(config)
    window, window_layers = _read_windows(config, layers, causal)
    heads, kv_heads, head_dim = _read_heads(config)
    hidden = _read_size(config, "hidden_size", MOST_WIDTH)
    positions = config.get("max_position_embeddings", int)
    modules = read_modules(source.pipeline, hidden)
    task = _find_task(source, config, modules, task, adapter)
    spec = ModelSpec(
        source=source,
        task=task,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate_size=_read_size(config, "intermediate_size", MOST_WIDTH),
        vocab_size=config.get("vocab_size", int),
        max_position_embeddings=positions,
        rope=read_rope(config.values, config.path, positions),
        rms_norm_eps=config.get("rms_norm_eps", float),
        tied=config.get("tie_word_embeddings", bool, False),
        max_length=read_length(
            source.pipeline, positions, None if modules is None else modules.max_length
        ),
        causal=causal,
        window=window,
        window_layers=window_layers,
        attention_bias=config.get("attention_bias", bool, False),
        quantization=read_quantization(config.values.get("quantization_config"), config.path),
        score_rows=read_score_rows(config, modules, adapter) if task == "reranker" else None,
        adapter=adapter,
    )
    spec = with_own_head(_with_pipeline(spec, config, modules))
    if adapter is not None:
        _check_adapted(spec, adapter)
    return spec


def with_own_head(spec: ModelSpec) -> ModelSpec:
    """Untie the spec's head if the weights on disk contain an lm_head, quantized or not.

    transformers ties the head to the embedding table only if the checkpoint stores no lm_head.
    """
    if not spec.tied or spec.task != "reranker" or spec.score_rows is not None:
        return spec
    replaced = spec.adapter is not None and spec.adapter.has_lm_head
    heads = {f"lm_head.{codes}" for codes in CODES}
    has_head = replaced or not heads.isdisjoint(tensor_names(spec.source.folder))
    return replace(spec, tied=not has_head)


def _refuse_other_adapters(source: Source) -> None:
    """Refuse an adapter in the checkpoint's folder if none was asked for."""
    if source.adapter is not None:
        return
    adapters = [*source.folder.glob(ADAPTER), *sorted(source.folder.glob(f"*/{ADAPTER}"))]
    if adapters:
        raise CheckpointError(
            f"{adapters[0]}: the checkpoint's folder holds an adapter: give `adapter` "
            f"{adapters[0].parent} to merge it into the weights, or take it out of the folder if "
            "they are complete without it"
        )


def _check_adapted(spec: ModelSpec, adapter: Adapter) -> None:
    """Refuse an adapter that does not fit its base."""
    if spec.quantization is not None:
        raise CheckpointError(
            f"{spec.source.folder / 'config.json'}: the base is quantized by "
            f"{spec.quantization.method!r}: give the original in bf16, fp16 or fp32; an adapter "
            "that was trained beside a quantized base (QLoRA) belongs to the original"
        )
    adapter.plan(spec.tensor_shapes(), embeds=spec.task == "embedding", is_tied=False)
    if spec.source.pipeline == spec.source.folder:
        _check_same_tokenizer(spec, adapter.folder)


def _check_same_tokenizer(spec: ModelSpec, adapter: Path) -> None:
    """Refuse an adapter folder with a tokenizer that differs from the base's.

    PEFT ignores it, but sentence-transformers would use it if modules.json were beside it.
    """
    base = spec.source.folder
    ours, theirs = base / "tokenizer.json", adapter / "tokenizer.json"
    if not theirs.exists():
        return
    same = ours.exists() and filecmp.cmp(ours, theirs, shallow=False)
    same = same or load_tokenizer(ours).to_str() == load_tokenizer(theirs).to_str()
    if same and spec.inputs.form == "messages" and has_template(adapter):
        same = read_template(base)[1] == read_template(adapter)[1]
    if not same:
        raise CheckpointError(
            f"{theirs}, or its chat template, differs from the base's in {base}, and nothing says "
            "which one the model needs: put the adapter's into a copy of the base, or take it out"
        )


def _read_size(config: Settings, key: str, most: int) -> int:
    size = config.get(key, int)
    if size > most:
        raise CheckpointError(f"{config.path}: {key} should be {most:,} at most, found {size:,}")
    return size


def _read_heads(config: Settings) -> tuple[int, int, int]:
    """(query heads, heads of keys and values, width of a head)."""
    heads = config.get("num_attention_heads", int)
    # An absent key means transformers' default, 32; null means the number of heads.
    kv_heads = config.values.get("num_key_value_heads", 32)
    kv_heads = heads if kv_heads is None else config.get("num_key_value_heads", int, 32)
    if heads % kv_heads:
        raise CheckpointError(
            f"{config.path}: num_attention_heads ({heads}) should be a multiple of "
            f"num_key_value_heads ({kv_heads})"
        )
    head_dim = config.get("head_dim", int, 128)
    if head_dim % 16 or head_dim > MOST_HEAD_DIM:
        raise CheckpointError(
            f"{config.path}: head_dim should be a multiple of 16, {MOST_HEAD_DIM} at most, found "
            f"{head_dim}"
        )
    return heads, kv_heads, head_dim


def _read_windows(
    config: Settings, layers: int, causal: bool
) -> tuple[int | None, tuple[int, ...]]:
    """(sliding window in tokens, the layers that have it), as in transformers' Qwen3Config."""
    # Absent keys have transformers' defaults.
    uses_window = config.get("use_sliding_window", bool, False)
    has_window = uses_window and config.values.get("sliding_window", 4096) is not None
    size = config.get("sliding_window", int, 4096) if has_window else None
    kinds = config.values.get("layer_types")
    if kinds is None:
        first = layers if size is None else config.values.get("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            raise CheckpointError(
                f"{config.path}: max_window_layers should be a number of layers, found {first!r}"
            )
        window_layers = tuple(range(first, layers))
    else:
        allowed = ("full_attention", "sliding_attention")
        if (
            not isinstance(kinds, list)
            or len(kinds) != layers
            or any(kind not in allowed for kind in kinds)
        ):
            raise CheckpointError(
                f"{config.path}: layer_types should be {layers} of {' or '.join(allowed)}, found "
                f"{shown(kinds)}"
            )
        window_layers = tuple(i for i, kind in enumerate(kinds) if kind == allowed[1])
    if window_layers and size is None:
        raise CheckpointError(
            f"{config.path}: layer_types has sliding_attention, but use_sliding_window and "
            "sliding_window give no window; give both, or make all layers full_attention"
        )
    if window_layers and not causal:
        raise CheckpointError(
            f"{config.path}: a sliding window with is_causal false is not supported"
        )
    return (size, window_layers) if window_layers else (None, ())


def _read_causal(config: Settings) -> bool:
    causal = config.get("is_causal", bool, True)
    if config.values.get("use_bidirectional_attention") and causal:
        raise CheckpointError(
            f"{config.path}: use_bidirectional_attention is "
            f"{config.values['use_bidirectional_attention']!r}, which transformers' Qwen3 does not "
            "read; it reads is_causal: set that to false for bidirectional attention, or take the "
            "key out for causal attention"
        )
    return causal


def _find_task(
    source: Source,
    config: Settings,
    modules: Modules | None,
    task: Task | None,
    adapter: Adapter | None,
) -> Task:
    """The task that the files state; the caller's `task` if they state none."""
    folder = source.folder
    architectures = config.values.get("architectures") or []
    if not isinstance(architectures, list):
        raise CheckpointError(
            f"{config.path}: architectures should be a list of names, found {architectures!r:.80}"
        )
    if modules is not None:
        stated: Task = "embedding" if modules.kind == "SentenceTransformer" else "reranker"
        if task not in (None, stated):
            raise InputError(
                f"{folder}: task is {task!r}, but modules.json makes it a {modules.kind}: "
                f"{stated!r}"
            )
        return stated
    if len(architectures) > 1 or any(name not in ARCHITECTURES for name in architectures):
        raise CheckpointError(
            f"{config.path}: architectures should be one of {', '.join(ARCHITECTURES)}, found "
            f"{architectures!r}"
        )
    if task is not None:
        return task
    if architectures == [CLASSIFIER] or config.values.get("classifier_from_token"):
        return "reranker"
    if adapter is not None and adapter.labels is not None:
        return "reranker"
    if adapter is not None and adapter.values.get("task_type") == "FEATURE_EXTRACTION":
        return "embedding"
    # Embedding checkpoints hold a bare Qwen3Model.
    if architectures == ["Qwen3Model"] or "embed_tokens.weight" in tensor_names(folder):
        return "embedding"
    declared = declared_task(source.adapter.folder) if source.adapter is not None else None
    declared = declared or declared_task(folder)
    if declared is None:
        raise UndeclaredTaskError(
            f"{folder}: its files do not state the task: it is a language model "
            f"({', '.join(architectures) or 'no architectures'}) without modules.json, and its "
            "model card (README.md) names neither a reranker nor an embedder by pipeline_tag, tags "
            "or base_model; give `task` embedding or `task` reranker"
        )
    return declared


def _with_pipeline(spec: ModelSpec, config: Settings, modules: Modules | None) -> ModelSpec:
    folder = spec.source.pipeline
    if modules is not None:
        inputs, outputs = modules.inputs, modules.outputs
    elif spec.task == "embedding":
        refuse_lone_pooling(folder, spec.hidden_size)
        prompts, default = read_prompts(folder)
        inputs, outputs = Inputs(prompts=prompts, default_prompt=default), Outputs()
    elif spec.score_rows is None:
        # vLLM's note of the answer tokens; the card's template asks for "yes" or "no".
        config.refuse("classifier_from_token", ["no", "yes"])
        inputs, outputs = Inputs(form="instruct"), Outputs(steps=())
    else:
        inputs, outputs = Inputs(), Outputs(steps=())
        if has_template(folder):
            inputs = Inputs(form="messages", message_format=infer_format(folder))
    split, side = read_token_settings(folder)
    inputs = replace(inputs, split_special_tokens=split, truncation_side=side)
    if inputs.form == "messages":
        _check_template(folder, inputs, spec.task)
    if spec.score_rows is not None:
        skipped = read_skipped_token(config, folder)
        inputs = replace(inputs, skipped_token=skipped, cuts_skipped=spec.causal)
    if spec.task == "reranker":
        activation = read_score_activation(spec.score_rows or 1, config, modules, folder)
        if inputs.form == "instruct" and activation != "sigmoid":
            raise CheckpointError(
                f"{config.path} asks CrossEncoder for the activation Identity, and by the model "
                "card, which is followed without modules.json, a score is a probability: put "
                "sentence-transformers' files beside it, or take the activation out"
            )
        outputs = replace(outputs, activation=activation)
    for answer in outputs.answers or ():
        if answer is not None and answer >= spec.vocab_size:
            raise CheckpointError(
                f"{folder}: LogitScore's token {answer} is outside the vocabulary of "
                f"{spec.vocab_size}"
            )
    return replace(spec, inputs=inputs, outputs=outputs)


def _check_template(folder: Path, inputs: Inputs, task: Task) -> None:
    """Refuse a chat template that sentence-transformers would render in another way."""
    template = ChatTemplate(folder, inputs.message_format, inputs.template_values)
    if task == "embedding" and template.reads_task():
        raise CheckpointError(
            f"{template.path}: the chat template reads task, which sentence-transformers sets "
            "for queries and documents, and that is not supported; set it in processing_kwargs "
            "of sentence_bert_config.json if one value is right for all texts"
        )
    if task == "reranker" and not template.carries_pairs():
        raise CheckpointError(
            f"{template.path}: the chat template does not render the roles 'query' and "
            "'document', so CrossEncoder would score a text without them; put a "
            "chat_template.jinja with both beside it (docs/checkpoint-files.md has Qwen3's)"
        )
