"""Checkpoints with seeded random weights, in the hub's exact layout, for tests and benchmarks.

Their results are meaningless, but the architecture and files are real, and at a real model's
geometry, so are size and speed. They are written shard by shard, so the 8B geometry needs no more
memory than one shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreTokenizers
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence as Processors
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer

from embedport.artifact.layout import write_json, write_sentence_transformers
from embedport.checkpoint.lora import open_floats
from embedport.checkpoint.spec import ModelSpec, Task
from embedport.checkpoint.tensor_files import INDEX, SINGLE
from embedport.checkpoint.tokens import SPLIT
from embedport.exporters.checkpoints.config import checkpoint_config
from embedport.exporters.checkpoints.methods import Options, plan_method
from embedport.exporters.checkpoints.packing import gptq_parts, packed_parts
from embedport.exporters.checkpoints.shards import ShardWriter
from embedport.exporters.companions import write_companions
from embedport.quantize.formats import matrices
from embedport.quantize.rtn import quantize_rtn
from embedport.texts.prompts import DEFAULT_INSTRUCTION, END_OF_TEXT, query_prompt, token_id

# Qwen's special tokens in the order of their ids (Qwen3's tokenizer.json).
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Model card: https://huggingface.co/Qwen/Qwen3-Embedding-0.6B (config_sentence_transformers.json).
DEFAULT_PROMPTS = {"query": query_prompt(DEFAULT_INSTRUCTION), "document": ""}
ADDED_TOKENS = ["<think>", "</think>"]
STORED: dict[str, Any] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
}


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Qwen3 model; names as in ModelSpec."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    tied: bool = True
    vocab_size: int | None = None  # the tokenizer's size unless given
    max_position_embeddings: int = 32768


# kv heads 1, 2 and 8; tied and untied; head_dim other than hidden / heads.
GEOMETRIES = {
    "kv1": Geometry(96, 3, 4, 1, 32, 200, tied=True),
    "kv2": Geometry(64, 2, 4, 2, 48, 160, tied=False),
    "kv8": Geometry(128, 2, 16, 8, 16, 256, tied=True),
    # Every matrix has a multiple of 64 inputs, as blocks of 64 need.
    "blocks": Geometry(64, 2, 4, 2, 48, 192, tied=True),
}
TINY = Geometry(64, 2, 4, 2, 32, 160)
QWEN3_0_6B = Geometry(1024, 28, 16, 8, 128, 3072, vocab_size=151_669)
QWEN3_4B = Geometry(2560, 36, 32, 8, 128, 9728, vocab_size=151_669)
QWEN3_8B = Geometry(4096, 36, 32, 8, 128, 12288, tied=False, vocab_size=151_669)


def write_checkpoint(
    folder: Path,
    geometry: Geometry,
    task: Task,
    tokenizer: Tokenizer,
    *,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    shard_bytes: int = 2 << 30,
    seed: int = 0,
) -> Path:
    """Write a checkpoint with random weights.

    Args:
        folder: The output folder; it is created, and existing files are overwritten.
        geometry: The model's sizes.
        task: Decides the tensors' names (`Qwen3Model` or `Qwen3ForCausalLM`) and the other files,
            including the model card's header.
        tokenizer: Saved as tokenizer.json; for an embedder it ends texts with `<|endoftext|>`.
        dtype: The stored dtype.
        shard_bytes: Maximum bytes per shard, unless one tensor is larger.
        seed: Seed of the random weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    # Only an embedder's tokenizer adds <|endoftext|>: a reranker's would add it after the body.
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    if task == "embedding":
        append_end_of_text(tokenizer, folder / "tokenizer.json")
        write_sentence_transformers(folder, geometry.hidden_size, DEFAULT_PROMPTS)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocab_size = geometry.vocab_size or tokenizer.get_vocab_size()
    write_json(folder / "config.json", _config(geometry, vocab_size, task, dtype, tokenizer))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 131072,
            "padding_side": "left",
            "pad_token": "<|endoftext|>",
            "eos_token": "<|im_end|>",
            "bos_token": None,
            "unk_token": None,
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "split_special_tokens": False,
        },
    )
    tag = "text-ranking" if task == "reranker" else "feature-extraction"
    card = f"---\nlibrary_name: transformers\npipeline_tag: {tag}\n---\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    spec = ModelSpec.from_checkpoint(folder)
    _write_shards(spec, STORED[dtype], shard_bytes, seed)
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file, which is created if missing; None takes a key out."""
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def round_to_nearest(
    source: Path, out: Path, method: str, task: Task = "embedding", *, group_size: int = 128
) -> Path:
    """Write a checkpoint in the format of `gptq` or `awq`, without calibration: in no time.

    Args:
        source: The checkpoint, in bf16 or fp16.
        out: The folder.
        method: "gptq" or "awq".
        task: The checkpoint's task.
        group_size: Inputs that share a scale.

    Returns:
        The folder.
    """
    spec = ModelSpec.from_checkpoint(source, task=task)
    plan, weights = plan_method(spec, Options(method, group_size=group_size)), open_floats(spec)
    pack = gptq_parts if method == "gptq" else packed_parts
    out.mkdir()
    write_companions(spec, out)
    form = "causal-lm" if task == "reranker" else None
    write_json(out / "config.json", checkpoint_config(spec, plan, form))
    prefix = "model." if task == "reranker" else ""
    quantized = {*matrices(spec)}
    with ShardWriter(out, 4 * len(spec.tensor_shapes())) as shards:
        for name in spec.tensor_shapes():
            matrix = name.removesuffix(".weight")
            if matrix not in quantized:
                stored = name if name == "lm_head.weight" else prefix + name
                shards.add(stored, weights.read(name))
                continue
            parts = pack(quantize_rtn(weights.read_fp32(name), plan.scheme))
            for part, tensor in parts.items():
                shards.add(f"{prefix}{matrix}.{part}", np.ascontiguousarray(tensor))
    return out


def plant_outliers(folder: Path, *, magnitude: float = 3000.0, seed: int = 0) -> None:
    """Add outliers like those of Qwen models to a single-shard checkpoint, in place.

    Outlier channels: in every layer, four channels after each RMSNorm are `magnitude` times larger
    than the others, and the weights that read them smaller by the same factor. Outlier tokens: one
    token in thirteen makes one SwiGLU channel of every layer about `magnitude` times the median,
    and down_proj reads that channel with small weights. fp32 still computes the function well, but
    with one scale per tensor, quantization loses all other values.
    """
    spec = ModelSpec.from_checkpoint(folder)
    prefix = "model." if spec.task == "reranker" else ""
    tensors = load_file(folder / SINGLE)
    generator = np.random.default_rng(seed)

    def change(name: str, index: Any, values: Any) -> None:
        tensor = tensors[f"{prefix}{name}.weight"]
        tensor[index] = np.asarray(values(tensor[index].astype(np.float32))).astype(tensor.dtype)

    direction = generator.standard_normal(spec.hidden_size).astype(np.float32)
    direction /= np.linalg.norm(direction)
    sizes = np.linalg.norm(tensors[f"{prefix}embed_tokens.weight"][:13].astype(np.float32), axis=1)
    change("embed_tokens", slice(0, None, 13), lambda rows: rows + sizes.mean() * direction)
    channels = generator.choice(spec.hidden_size, 4, replace=False)
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for layer in range(spec.num_layers):
        # The outlier tokens' channel: gate and up rows read the direction, down_proj undoes it.
        width = spec.hidden_size**0.5
        row = int(generator.integers(spec.intermediate_size))
        reading = direction * (magnitude**0.5 / width)
        for name in readers["post_attention_layernorm"]:
            change(f"layers.{layer}.{name}", row, lambda old, reading=reading: reading)
        columns = (slice(None), row)
        change(f"layers.{layer}.mlp.down_proj", columns, lambda old: old / magnitude)
        for norm, names in readers.items():
            change(f"layers.{layer}.{norm}", channels, lambda gains: gains * magnitude)
            for name in names:
                columns = (slice(None), channels)
                change(f"layers.{layer}.{name}", columns, lambda old: old / magnitude)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def append_end_of_text(tokenizer: Tokenizer, path: Path) -> int:
    """Make the tokenizer end every text with `<|endoftext|>`, and return that token's id.

    The first published tokenizer.json did not add it:
    https://github.com/QwenLM/Qwen3-Embedding/issues/54
    """
    end_id = token_id(tokenizer, END_OF_TEXT, path)
    if tokenizer.encode("a").ids[-1] != end_id:
        template = TemplateProcessing(
            single=f"$A {END_OF_TEXT}", special_tokens=[(END_OF_TEXT, end_id)]
        )
        present = tokenizer.post_processor
        tokenizer.post_processor = (
            Processors([present, template]) if present is not None else template
        )
    return end_id


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> Tokenizer:
    """Train a small byte-level BPE with Qwen's pre-tokenization and the tokens "yes" and "no"."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = NFC()
    tokenizer.pre_tokenizer = PreTokenizers(
        [
            Split(Regex(SPLIT), behavior="isolated"),
            ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.post_processor = ByteLevelProcessor(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(ADDED_TOKENS),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    # "yes" and "no" are repeated so that each becomes a single token.
    tokenizer.train_from_iterator([*texts, *["yes", "no"] * 1000], trainer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.add_tokens(ADDED_TOKENS)
    return tokenizer


def _config(
    geometry: Geometry, vocab_size: int, task: Task, dtype: str, tokenizer: Tokenizer
) -> dict[str, Any]:
    end_of_text, _, end_of_turn = map(tokenizer.token_to_id, SPECIAL_TOKENS)
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text if task == "embedding" else end_of_turn,
        "head_dim": geometry.head_dim,
        "hidden_act": "silu",
        "hidden_size": geometry.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": geometry.intermediate_size,
        "max_position_embeddings": geometry.max_position_embeddings,
        "max_window_layers": geometry.num_layers,
        "model_type": "qwen3",
        "num_attention_heads": geometry.num_heads,
        "num_hidden_layers": geometry.num_layers,
        "num_key_value_heads": geometry.num_kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": geometry.tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }


def _write_shards(spec: ModelSpec, dtype: Any, shard_bytes: int, seed: int) -> None:
    folder = spec.source.folder
    prefix = "model." if spec.task == "reranker" else ""
    index: dict[str, str] = {}
    shards = list(_group(spec.tensor_shapes(), np.dtype(dtype).itemsize, shard_bytes))
    generator = np.random.default_rng(seed)
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name in names:
            stored = name if name == "lm_head.weight" else prefix + name
            tensors[stored] = _random(generator, spec.tensor_shapes()[name], dtype)
            index[stored] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {}, "weight_map": index})


def _group(
    shapes: dict[str, tuple[int, ...]], itemsize: int, shard_bytes: int
) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        nbytes = int(np.prod(shape)) * itemsize
        if names and size + nbytes > shard_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def _random(generator: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Random RMSNorm gains around 1, or a matrix with the standard deviation of Qwen's init."""
    if len(shape) == 1:
        return (1 + 0.1 * generator.standard_normal(shape, np.float32)).astype(dtype)
    tensor = np.empty(shape, dtype)
    for start in range(0, shape[0], 4096):
        rows = tensor[start : start + 4096]
        rows[...] = 0.02 * generator.standard_normal(rows.shape, np.float32)
    return tensor
