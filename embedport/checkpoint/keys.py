"""The keys of a checkpoint's files: those that are read, those without effect; others are refused.

Source: the code of transformers 5.23 and 4.57, and sentence-transformers 6.2. All keys are listed
in docs/checkpoint-files.md.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

# config.json, keys without effect: for training, generation, storage and serving, and tools' notes.
CONFIG_NOTES = frozenset(
    [
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "attention_dropout",
        "attn_implementation",
        "base_model_name_or_path",
        "begin_suppress_tokens",
        "bos_token_id",
        "classifier_dropout",
        "cross_attention_hidden_size",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "dtype",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "eos_token_id",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "gradient_checkpointing",
        "initializer_range",
        "is_matryoshka",
        "is_original_qwen3_reranker",
        "label2id",
        "length_penalty",
        "matryoshka_dimensions",
        "max_length",
        "min_length",
        "model_name",
        "name_or_path",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_attentions",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "top_k",
        "top_p",
        "torch_dtype",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_cache",
        "use_pad_token",
        "use_sep_token",
    ]
)
# config.json, keys that `spec` and `tokens` read.
CONFIG_READ = frozenset(
    [
        "architectures",
        "attention_bias",
        "auto_map",
        "classifier_from_token",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "id2label",
        "intermediate_size",
        "is_causal",
        "layer_types",
        "max_position_embeddings",
        "max_window_layers",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "num_labels",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "sbert_ce_default_activation_function",
        "sentence_transformers",
        "sliding_window",
        "tie_word_embeddings",
        "tokenizer_class",
        "use_bidirectional_attention",
        "use_sliding_window",
        "vocab_size",
    ]
)
# config.json, keys that have no effect at these values.
CONFIG_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "add_cross_attention": (False,),
    "bad_words_ids": (None,),
    "chunk_size_feed_forward": (0,),
    "is_decoder": (True, False),
    "is_encoder_decoder": (False,),
    "output_hidden_states": (True, False),
    "per_layer_config": (None, {}),
    "pruned_heads": ({}, None),
    "tf_legacy_loss": (True, False),
    "tie_encoder_decoder": (False,),
    "transformers_weights": (None,),
    "use_bfloat16": (True, False),
}
# adapter_config.json, keys that `adapter` reads.
ADAPTER_READ = frozenset(
    [
        "base_model_name_or_path",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "alpha_pattern",
        "revision",
        "target_modules",
        "task_type",
        "use_rslora",
    ]
)
# adapter_config.json, keys without effect: for training, and for layers that Qwen3 does not have.
# "bias" is among them because trained biases are tensors, which are read or refused themselves.
ADAPTER_NOTES = frozenset(
    [
        "auto_mapping",
        "bias",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "runtime_config",
    ]
)
# adapter_config.json: PEFT's variants of LoRA, none of which is supported, are off at these values.
ADAPTER_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (False,),
    "use_qalora": (False,),
    "velora_config": (None,),
}
# config_sentence_transformers.json, keys without effect.
SENTENCE_TRANSFORMERS_NOTES = frozenset(("__version__", "keep_in_fp32_modules", "requirements"))
# sentence_bert_config.json, keys without effect.
TRANSFORMER_NOTES = frozenset(("unpad_inputs",))
# The same within its model_kwargs, processor_kwargs and config_kwargs.
LOADING_NOTES = frozenset(
    [
        "attn_implementation",
        "cache_dir",
        "device_map",
        "dtype",
        "local_files_only",
        "low_cpu_mem_usage",
        "padding_side",
        "revision",
        "token",
        "torch_dtype",
        "trust_remote_code",
        "use_cache",
        "use_fast",
        "use_safetensors",
    ]
)


def refuse_unknown(
    values: Mapping[str, Any], path: Path, read: Container[str], notes: Container[str] = ()
) -> None:
    """Refuse a file with a key that is neither read nor known to have no effect.

    Keys that are null are ignored.

    Args:
        values: The file's values.
        path: The file, for the error.
        read: Keys that are read.
        notes: Keys without effect on results.

    Raises:
        CheckpointError: The file has such a key.
    """
    for key, value in values.items():
        if key in read or key in notes or value is None:
            continue
        if key in CONFIG_NEUTRAL and value in CONFIG_NEUTRAL[key]:
            continue
        raise CheckpointError(
            f"{path}: the key {key!r} is not known here, and its value {shown(value)} may change "
            "what the model computes; take the key out if it does not (docs/checkpoint-files.md "
            "lists those that are read)"
        )


def shown(value: object) -> str:
    """A value's repr for a message, shortened to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
