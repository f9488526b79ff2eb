"""config.json of a quantized checkpoint: what each library reads to find its way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ...files import read_json
from ...prompts import END_OF_TEXT, load_tokenizer, token_id
from ...quantize.gptq import DAMPING
from ...spec import ModelSpec
from ...version import __version__
from .methods import Plan

# How a reranker is written: its own form, or one logit, W_yes - W_no, as a classifier's head.
Form = Literal["causal-lm", "sequence-classification"]
FORMS: tuple[Form, ...] = ("causal-lm", "sequence-classification")
CLASSIFIER = "Qwen3ForSequenceClassification"
# Whoever wraps the model gives it one of these heads; both stay as they are.
NOT_QUANTIZED = ["lm_head", "score"]
PROJECTIONS = [
    ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
    ["self_attn.o_proj"],
    ["mlp.up_proj", "mlp.gate_proj"],
    ["mlp.down_proj"],
]


def checkpoint_config(spec: ModelSpec, plan: Plan, form: Form | None) -> dict[str, Any]:
    """The source's config.json with the quantization and what vLLM needs to know.

    Args:
        spec: The source.
        plan: How it is quantized.
        form: Of a reranker; None for an embedder.
    """
    config = read_json(spec.source.folder / "config.json")
    for key in {"dtype", "torch_dtype"} & config.keys() or {"torch_dtype"}:
        config[key] = plan.dtype
    return config | _task_values(spec, form) | {"quantization_config": quantization_config(plan)}


def _task_values(spec: ModelSpec, form: Form | None) -> dict[str, Any]:
    if form is None:
        return vllm_overrides(spec, form)
    # Query and document come in one text, which the template has put together.
    values: dict[str, Any] = {"use_pad_token": False, "use_sep_token": False}
    if form == "causal-lm":
        own = vllm_overrides(spec, form)
        del own["architectures"]  # the folder's own is what transformers loads
        return values | own
    path = spec.source.folder / "tokenizer.json"
    return values | {
        "architectures": [CLASSIFIER],
        "num_labels": 1,
        "id2label": {"0": "yes"},
        "label2id": {"yes": 0},
        "pad_token_id": token_id(load_tokenizer(path), END_OF_TEXT, path),
        "sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"},
    }


def vllm_overrides(spec: ModelSpec, form: Form | None) -> dict[str, Any]:
    """What `vllm serve --hf-overrides` is to be given; empty where nothing is.

    https://docs.vllm.ai/en/latest/models/pooling_models (Matryoshka embeddings, rerankers)
    """
    if form is None:
        # Powers of two from 32 up, and the whole width.
        widths = {1 << i for i in range(5, spec.hidden_size.bit_length())} | {spec.hidden_size}
        return {"is_matryoshka": True, "matryoshka_dimensions": sorted(widths)}
    if form == "causal-lm":
        return {
            "architectures": [CLASSIFIER],
            "classifier_from_token": ["no", "yes"],
            "is_original_qwen3_reranker": True,
        }
    return {}


def quantization_config(plan: Plan) -> Mapping[str, Any]:
    """`quantization_config`, made by the library that reads it where it has code for that."""
    if plan.method.library == "gptq":
        return gptq_config(plan)
    if plan.method.library == "bitsandbytes":
        return _bitsandbytes_config(plan)
    return _compressed_tensors_config(plan)


def gptq_config(plan: Plan) -> dict[str, Any]:
    """AutoGPTQ's, which stands in quantize_config.json too."""
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
        made = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    else:
        made = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=plan.double_quant,
            bnb_4bit_compute_dtype=plan.dtype,
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
    return made.to_dict()


def _compressed_tensors_config(plan: Plan) -> dict[str, Any]:
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import (
        QuantizationConfig,
        QuantizationStatus,
        preset_name_to_scheme,
    )

    scheme = preset_name_to_scheme(plan.method.preset, targets=["Linear"])
    if plan.group_size is not None:
        assert scheme.weights is not None
        scheme.weights.group_size = plan.group_size
    scheme.format = CompressionFormat(plan.method.format)
    made = QuantizationConfig(
        config_groups={"group_0": scheme},
        format=plan.method.format,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=NOT_QUANTIZED,
    )
    # transformers would unpack matrices when the model is first called, and sentence-transformers
    # calls its forward() only: so they are unpacked on load. Servers with kernels do not read this.
    return {**made.model_dump(mode="json"), "dequantize": True}
