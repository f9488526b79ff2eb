"""config.json of a quantized checkpoint: the settings that each library loads it by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...checkpoint.classifier import CLASSIFIER
from ...checkpoint.spec import CAUSAL_LM, ModelSpec
from ...quantize.gptq import DAMPING
from ...strict_json import read_json
from ...texts.prompts import find_answers, load_tokenizer
from ...version import __version__
from ..classifier import classifier_values
from .methods import Plan

# A reranker's form: its own causal LM, or a classifier with one logit, W_yes - W_no.
Form = Literal["causal-lm", "sequence-classification"]
FORMS: tuple[Form, ...] = ("causal-lm", "sequence-classification")
# Heads that a task's model class adds to the layers; neither is quantized.
NOT_QUANTIZED = ["lm_head", "score"]
PROJECTIONS = [
    ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
    ["self_attn.o_proj"],
    ["mlp.up_proj", "mlp.gate_proj"],
    ["mlp.down_proj"],
]


def checkpoint_config(spec: ModelSpec, plan: Plan, form: Form | None) -> dict[str, Any]:
    """The source's config.json, plus the quantization and the settings that vLLM needs.

    Args:
        spec: The source.
        plan: How it is quantized.
        form: A reranker's form; None for an embedder.
    """
    config = read_json(spec.source.folder / "config.json") | _rope_values(spec)
    config.pop("rope_parameters" if spec.rope.kind != "default" else "rope_scaling", None)
    if form == "causal-lm":
        config |= {"architectures": [CAUSAL_LM], "tie_word_embeddings": spec.tied}
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = plan.dtype
    return config | _task_values(spec, form) | {"quantization_config": quantization_config(plan)}


def _rope_values(spec: ModelSpec) -> dict[str, Any]:
    """The rotary embedding's settings, for both transformers 4 and 5.

    4 ignores rope_parameters and would use a theta of 10,000; 5 prefers rope_scaling to them.
    """
    values = spec.rope.to_parameters()
    theta = values.pop("rope_theta")
    if spec.rope.kind == "default":
        return {"rope_theta": theta}
    if spec.rope.original == spec.max_position_embeddings:
        # Both default to that; if it is given, 4 divides the two instead of using the factor.
        del values["original_max_position_embeddings"]
    return {"rope_theta": theta, "rope_scaling": values}


def _task_values(spec: ModelSpec, form: Form | None) -> dict[str, Any]:
    if form is None:
        return vllm_overrides(spec, form)
    # The chat template joins query and document into one text.
    values: dict[str, Any] = {"use_pad_token": False, "use_sep_token": False}
    if form == "causal-lm":
        overrides = vllm_overrides(spec, form)
        overrides.pop("architectures", None)  # transformers loads the checkpoint's own
        return values | overrides
    return values | classifier_values(spec)


def vllm_overrides(spec: ModelSpec, form: Form | None) -> dict[str, Any]:
    """The value of `vllm serve --hf-overrides`; empty if none is needed.

    https://docs.vllm.ai/en/latest/models/pooling_models (Matryoshka embeddings, rerankers)
    """
    if form is None:
        # Powers of two from 32, and the full width.
        full = spec.embedding_dim
        widths = {1 << i for i in range(5, full.bit_length())} | {full}
        return {"is_matryoshka": True, "matryoshka_dimensions": sorted(widths)}
    if form != "causal-lm":
        return {}
    yes, no = find_answers(spec)
    if no is None:
        return {}  # vLLM subtracts two tokens' logits
    tokenizer = load_tokenizer(spec.source.pipeline / "tokenizer.json")
    return {
        "architectures": [CLASSIFIER],
        "classifier_from_token": [tokenizer.id_to_token(token) for token in (no, yes)],
        "is_original_qwen3_reranker": True,
    }


def quantization_config(plan: Plan) -> Mapping[str, Any]:
    """`quantization_config`; the library that reads it creates it, if it has code for that."""
    if plan.method.library == "gptq":
        return gptq_config(plan)
    if plan.method.library == "bitsandbytes":
        return _bitsandbytes_config(plan)
    return _compressed_tensors_config(plan)


def gptq_config(plan: Plan) -> dict[str, Any]:
    """AutoGPTQ's `quantization_config`, which is also written to quantize_config.json."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": plan.bits,
        "group_size": plan.group_size,
        "sym": True,
        "desc_act": False,
        "static_groups": True,
        "true_sequential": False,
        "damp_percent": DAMPING,
        "lm_head": False,
        "modules_in_block_to_quantize": PROJECTIONS,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"embedport:{__version__}"]},
    }


def _bitsandbytes_config(plan: Plan) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    if plan.name == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=plan.double_quant,
            bnb_4bit_compute_dtype=plan.dtype,
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    return config.to_dict()


def _compressed_tensors_config(plan: Plan) -> dict[str, Any]:
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    preset = plan.method.preset
    if plan.symmetric:
        preset = preset.removesuffix("_ASYM")
    scheme = preset_name_to_scheme(preset, targets=["Linear"])
    if plan.group_size is not None:
        assert scheme.weights is not None
        scheme.weights.group_size = plan.group_size
    scheme.format = CompressionFormat(plan.method.format)
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=plan.method.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=NOT_QUANTIZED,
    )
    # By default transformers unpacks matrices at the model's first call, but sentence-transformers
    # calls only forward(): unpack on load. transformers before 5.15, and servers with their own
    # kernels, ignore this.
    return {**config.model_dump(mode="json"), "dequantize": True}
