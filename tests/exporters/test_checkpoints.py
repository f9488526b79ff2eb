"""Quantized checkpoints: opened by the libraries that own the formats, read back bit for bit."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import embedport
from embedport import demo
from embedport.artifact.card import recipe_words
from embedport.checkpoint.spec import ModelSpec
from embedport.checkpoint.tensor_files import read_headers
from embedport.checkpoint.weights import Weights
from embedport.errors import CheckpointError, InputError
from embedport.exporters.calibration.gptq_awq import quantize_layers
from embedport.exporters.checkpoints import Options, estimate_checkpoint
from embedport.exporters.checkpoints.methods import plan_method
from embedport.exporters.checkpoints.packing import gptq_parts, nf4_parts, packed_parts
from embedport.exporters.checkpoints.shards import ShardWriter
from embedport.exporters.onnx import Options as OnnxOptions
from embedport.exporters.onnx import estimate_onnx
from embedport.exporters.texts import tokenize_samples
from embedport.quantize import nf4
from embedport.quantize.formats import Format, matrices
from embedport.quantize.rotation import RotatedHeads
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from embedport.quantize.stored import StoredWeights
from embedport.quantize.unpacking import unpack
from embedport.texts.prompts import RerankerTokenizer
from embedport.texts.samples import builtin_pairs

METHODS = ("bnb-int8", "bnb-nf4", "gptq", "awq", "w8a8", "fp8")
PREFIX = {"embedding": "", "reranker": "model."}


def stored_integers(folder, bits):
    """Matrix to its codes uint8 [out, in], unpacked word by word."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, words in tensors.items():
        matrix, _, part = name.removeprefix("model.").rpartition(".")
        if part not in ("qweight", "weight_packed"):
            continue
        words = (words.T if part == "qweight" else words).contiguous().numpy()
        codes = words.view(np.uint8)
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(words), -1)
        found[matrix] = codes
    return found


@pytest.mark.parametrize(
    ("method", "bits", "precision", "task"),
    [
        ("gptq", 4, "int4", "embedding"),
        pytest.param("gptq", 4, "int4", "reranker", marks=pytest.mark.slow),
        ("gptq", 8, "int8-weight", "embedding"),
        ("awq", 4, "int4", "embedding"),
    ],
)
def test_exported_with_the_same_integers(quantized, tmp_path, method, bits, precision, task):
    folder = quantized(method, task, **({"bits": 8, "group_size": 32} if bits == 8 else {}))
    codes = stored_integers(folder, bits)
    artifact = embedport.export(folder, tmp_path / "graph", precision=precision, embedding_bits=8)
    initializers = {
        name: ir.tensor(value.const_value).numpy()
        for name, value in ir.load(artifact.graph).graph.initializers.items()
        if value.const_value is not None and name.endswith("_proj.codes")
    }
    assert len(initializers) == len(codes) == 14
    for matrix, expected in codes.items():
        blocks = initializers[f"{matrix}.codes"]
        if bits == 4:
            blocks = np.stack([blocks & 15, blocks >> 4], axis=-1)
        np.testing.assert_array_equal(blocks.reshape(len(expected), -1), expected)
    assert artifact.manifest.recipe is not None
    assert artifact.manifest.recipe["algorithm"] == "stored"


def test_pairs_with_instructions_of_their_own(checkpoints, tmp_path):
    spec = ModelSpec.from_checkpoint(checkpoints("kv2", "reranker"))
    instructions = ["Find the herb.", None, "Find the herb."]
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": "tea", "document": "a leaf", "instruction": one} for one in instructions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = RerankerTokenizer(spec.source.pipeline / "tokenizer.json", 99, spec.inputs)
    for ids, instruction in zip(tokenize_samples(spec, 99, path), instructions, strict=True):
        np.testing.assert_array_equal(
            ids, tokenizer.encode([("tea", "a leaf")], instruction).ids[0]
        )
    path.write_text('{"query": "tea", "document": "a leaf", "instruction": 3}\n')
    with pytest.raises(InputError, match=r"pairs.jsonl:1 .*a value is not a string"):
        tokenize_samples(spec, 99, path)


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_gptq_holds_the_cores_own_codes(short, quantized, checkpoints, tmp_path, bits):
    options = {"bits": bits, "group_size": 32}
    folder = quantized("gptq", **options)
    source = ModelSpec.from_checkpoint(checkpoints("kv8"))
    weights = Weights(source)
    scheme = QuantScheme(bits, 32, symmetric=True, scale_dtype="float16")
    rows = tokenize_samples(source, source.max_length, short.file("embedding", tmp_path))
    formats = dict.fromkeys(matrices(source), Format(scheme))
    rotated = RotatedHeads.seeded(weights)
    core = quantize_layers(weights, rotated, formats, rows, tmp_path / "layers", lambda: None)
    stored = StoredWeights(ModelSpec.from_checkpoint(folder))
    assert stored.schemes.keys() == formats.keys()
    for name in formats:
        found, expected = stored.read_quantized(name), core(name)
        np.testing.assert_array_equal(found.codes, expected.codes)
        np.testing.assert_array_equal(found.zero_points, expected.zero_points)
        np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_packing_round_trip(bits, symmetric):
    generator = np.random.default_rng(bits)
    scheme = QuantScheme(bits, 32, symmetric, "float16")
    tensor = quantize_rtn(generator.standard_normal((16, 96), np.float32), scheme)
    parts = gptq_parts(tensor)
    assert {name: (each.dtype.name, each.shape) for name, each in parts.items()} == {
        "qweight": ("int32", (96 * bits // 32, 16)),
        "qzeros": ("int32", (3, 16 * bits // 32)),
        "scales": ("float16", (3, 16)),
        "g_idx": ("int32", (96,)),
    }
    # The format's definition: code i of a column is in word i // count, at bits * (i % count).
    count = 32 // bits
    words = parts["qweight"].astype(np.int64) & 0xFFFFFFFF
    for i in (0, 1, count - 1, count, 95):
        code = words[i // count] >> (bits * (i % count)) & (scheme.levels - 1)
        np.testing.assert_array_equal(code, tensor.codes[:, i])
    zeros = (unpack(parts["qzeros"], bits) + np.uint8(1)) & np.uint8(scheme.levels - 1)
    np.testing.assert_array_equal(zeros.T, tensor.zero_points)
    np.testing.assert_array_equal(parts["scales"].T, tensor.scales)


@pytest.mark.parametrize("preset_name", ["W4A16", "W4A16_ASYM"])
def test_compressed_tensors_unpacks_the_same_numbers(preset_name):
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = QuantScheme(4, 32, symmetric=preset_name == "W4A16", scale_dtype="bfloat16")
    weight = np.random.default_rng(0).standard_normal((16, 96), np.float32) + 0.5
    tensor = quantize_rtn(weight, scheme)
    parts: dict[str, torch.Tensor | None] = {
        # torch cannot take numpy's bfloat16; the scales are its values in fp32 as well.
        name: torch.from_numpy(each.astype(np.float32) if name == "weight_scale" else each)
        for name, each in packed_parts(tensor).items()
    }
    preset = preset_name_to_scheme(preset_name, ["Linear"])
    assert preset.weights is not None
    preset.weights.group_size = 32
    found = PackedQuantizationCompressor.decompress(parts, preset)["weight"]
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), tensor.dequantize())
    assert parts.keys() == set(PackedQuantizationCompressor.compression_param_names(preset))


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4", "bnb-nf4 double"])
def test_bitsandbytes_tensors_are_transformers_own(
    quantized, checkpoints, copied, tmp_path, method
):
    from transformers import AutoModel, BitsAndBytesConfig

    name, _, double = method.partition(" ")
    fast = {"fast": True} if name == "bnb-nf4" else {}
    folder = quantized(name, **fast, **({"double_quant": True} if double else {}))
    if name == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype="bfloat16",
        )
    # What is quantized: the checkpoint with its attention heads rotated.
    source = copied(checkpoints("kv8"))
    rotated = RotatedHeads.seeded(Weights(ModelSpec.from_checkpoint(source)))
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if name.endswith(("v_proj.weight", "o_proj.weight")):
            tensors[name] = torch.from_numpy(rotated.read_fp32(name)).bfloat16()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    model = AutoModel.from_pretrained(source, quantization_config=config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    ours = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert ours.pop("llm_int8_skip_modules") == ["lm_head", "score"]
    del written["llm_int8_skip_modules"]
    assert ours == written


def test_nf4_holds_the_cores_own_values(short, quantized, checkpoints, tmp_path):
    """bitsandbytes unpacks what GPTAQ rounded, bit for bit; of quantized scales, what it reads."""
    stored = load_file(quantized("bnb-nf4") / "model.safetensors")
    weights = Weights(ModelSpec.from_checkpoint(checkpoints("kv8")))
    texts = short.file("embedding", tmp_path)
    rows = tokenize_samples(weights.spec, weights.spec.max_length, texts)
    scheme = QuantScheme(4, 64, symmetric=True, nf4=True)
    formats = dict.fromkeys(matrices(weights.spec), Format(scheme))
    rotated = RotatedHeads.seeded(weights)
    core = quantize_layers(weights, rotated, formats, rows, tmp_path / "layers", lambda: None)
    for name in formats:
        parts = {key: value for key, value in stored.items() if key.startswith(f"{name}.weight")}
        values = torch.from_numpy(core(name).dequantize()).bfloat16()
        assert torch.equal(unpack_by_bitsandbytes(parts), values)
    plan = plan_method(weights.spec, Options("bnb-nf4", double_quant=True))
    packed = nf4_parts(tensor := core(name), plan)
    parts = {f"{name}.{part}": torch.from_numpy(value) for part, value in packed.items()}
    absmax, nested = parts[f"{name}.weight.absmax"], parts[f"{name}.weight.nested_absmax"]
    state = json.loads(bytes(packed["weight.quant_state.bitsandbytes__nf4"]))
    factors = nested.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
    levels = parts[f"{name}.weight.nested_quant_map"][absmax.long()]
    scales = (levels * factors + state["nested_offset"]).numpy().reshape(tensor.scales.shape)
    np.testing.assert_allclose(scales, tensor.scales, rtol=0.1)
    values = torch.from_numpy(replace(tensor, scales=scales).dequantize()).bfloat16()
    assert torch.equal(unpack_by_bitsandbytes(parts), values)


def unpack_by_bitsandbytes(parts):
    """A matrix of its stored tensors: bfloat16 [out, in]."""
    from bitsandbytes.functional import QuantState, dequantize_4bit

    stats = {name: value for name, value in parts.items() if not name.endswith(".weight")}
    (data,) = (value for name, value in parts.items() if name.endswith(".weight"))
    return dequantize_4bit(data, QuantState.from_dict(stats, torch.device("cpu")))


def test_nf4_rounds_to_bitsandbytes_own_codes():
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    np.testing.assert_array_equal(nf4.LEVELS, get_4bit_type("nf4", "cpu").numpy())
    weight = np.random.default_rng(0).standard_normal((64, 256), np.float32)
    tensor = quantize_rtn(weight, QuantScheme(4, 64, symmetric=True, nf4=True))
    data, state = quantize_4bit(torch.from_numpy(weight), quant_type="nf4")
    np.testing.assert_array_equal(tensor.scales.ravel(), state.absmax.numpy())
    packed = data.numpy().reshape(64, 128)
    codes = np.stack([packed >> 4, packed & 15], axis=2).reshape(64, 256)
    assert (codes == tensor.codes).mean() > 0.9999  # bitsandbytes multiplies by 1 / absmax


@pytest.mark.parametrize(
    ("method", "task"),
    [
        pytest.param(
            method,
            task,
            # What stays in a reranker is no method's: two of them stand for all.
            marks=[pytest.mark.slow]
            if task == "reranker" and method not in ("bnb-int8", "gptq")
            else [],
        )
        for method in METHODS
        for task in ("embedding", "reranker")
    ],
)
def test_names_and_what_stays_in_16_bits(quantized, checkpoints, method, task):
    folder, prefix = quantized(method, task), PREFIX[task]
    found = load_file(folder / "model.safetensors")
    original = load_file(checkpoints("kv8", task) / "model.safetensors")
    assert all(name.startswith(prefix) for name in found)  # a tie stays a tie: no lm_head
    kept = ["embed_tokens", "norm", "layers.1.self_attn.q_norm", "layers.1.self_attn.k_norm"]
    for name in kept:
        assert torch.equal(found[f"{prefix}{name}.weight"], original[f"{prefix}{name}.weight"])
    config = json.loads((folder / "config.json").read_text())
    assert config["tie_word_embeddings"]
    assert config["torch_dtype"] == "bfloat16"
    assert sum(name.endswith("_proj.weight") for name in found) in (0, 14)
    manifest = embedport.Artifact.open(folder).manifest
    assert (manifest.format, manifest.precision, manifest.task) == ("checkpoint", method, task)
    assert (folder / "modules.json").exists() == (task == "embedding")
    assert (folder / "README.md").is_file()


def test_an_untied_head_stays(quantized, checkpoints):
    folder = quantized("w8a8", "reranker", "kv2")
    found = load_file(folder / "model.safetensors")
    original = load_file(checkpoints("kv2", "reranker") / "model.safetensors")
    assert torch.equal(found["lm_head.weight"], original["lm_head.weight"])
    folder = quantized("w8a8", "reranker", "kv2", form="sequence-classification")
    found = load_file(folder / "model.safetensors")
    tokenizer = RerankerTokenizer(folder / "tokenizer.json", 4096).tokenizer
    yes, no = (original["lm_head.weight"][tokenizer.token_to_id(w)].float() for w in ("yes", "no"))
    assert "lm_head.weight" not in found
    assert torch.equal(found["score.weight"], (yes - no)[None].bfloat16())


@pytest.mark.slow
def test_w8a8_keeps_a_trained_rerankers_scores(tmp_path):
    """Factors from texts and compensated rounding, against factors from weights and rounding.

    Both are compared with fp32: the checkpoint's own bf16 is 0.0066 from it. On average over pairs:
    the worst pair's difference is 0.013 to 0.039 by the random basis, and 0.043 with `fast`.
    """
    folder = Path(demo.__file__).parent / "reranker"
    pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
    exact = embedport.export(folder, tmp_path / "fp32")
    expected = np.array(embedport.load_reranker(exact.folder, device="cpu").score(pairs))
    means = []
    for fast in (False, True):
        artifact = embedport.quantize_checkpoint(
            folder, tmp_path / str(fast), method="w8a8", fast=fast
        )
        assert artifact.manifest.recipe is not None
        assert artifact.manifest.recipe["balance"] == fast
        found = embedport.load_reranker(artifact.folder, device="cpu").score(pairs)
        means.append(np.abs(found - expected).mean())
    assert means[0] < 0.7 * means[1]


def test_what_vllm_needs(quantized):
    embedder = json.loads((quantized("fp8") / "config.json").read_text())
    assert embedder["is_matryoshka"]
    assert embedder["matryoshka_dimensions"] == [32, 64, 128]
    assert "--hf-overrides" in (quantized("fp8") / "vllm.md").read_text()
    reranker = quantized("fp8", "reranker")
    config = json.loads((reranker / "config.json").read_text())
    assert config["classifier_from_token"] == ["no", "yes"]
    assert config["is_original_qwen3_reranker"]
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["quantization_config"]["ignore"] == ["lm_head", "score"]
    guide = (reranker / "vllm.md").read_text()
    assert '"architectures": ["Qwen3ForSequenceClassification"]' in guide
    assert "--chat-template fp8/chat_template.jinja" in guide.replace("reranker-fp8", "fp8")
    classifier = quantized("fp8", "reranker", form="sequence-classification")
    config = json.loads((classifier / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForSequenceClassification"]
    assert "is_original_qwen3_reranker" not in config
    assert len(config["id2label"]) == 1


def test_the_template_gives_the_rerankers_own_tokens(short, quantized):
    from transformers import AutoTokenizer

    folder = quantized("fp8", "reranker")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    for (query, document), expected in zip(
        short.pairs, short.rows(folder, "reranker"), strict=True
    ):
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_16_bit_dtype(checkpoints, tmp_path, dtype):
    """fp16 stays fp16; fp32 becomes bf16."""
    source = checkpoints("kv8", dtype=dtype)
    embedport.quantize_checkpoint(source, tmp_path / "out", method="w8a8", fast=True)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"float16": torch.float16, "float32": torch.bfloat16}[dtype]
    assert {each.dtype for each in tensors.values()} == {expected, torch.int8}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("task", "geometry", "options", "message"),
    [
        ("embedding", "kv8", {"method": "gguf"}, "method should be one of bnb-int8, .* 'gguf'"),
        ("embedding", "kv8", {"method": "awq", "bits": 8}, "awq has 4 bits, found `bits` 8"),
        ("embedding", "kv8", {"method": "gptq", "bits": 3}, "gptq has 4 or 8 bits"),
        ("embedding", "kv8", {"method": "fp8", "group_size": 64}, "`group_size` goes with gptq, a"),
        ("embedding", "kv8", {"method": "gptq", "group_size": 48}, "group_size should be one of"),
        (
            "embedding",
            "kv8",
            {"method": "gptq", "double_quant": True},
            "goes with `method` bnb-nf4",
        ),
        (
            "embedding",
            "kv2",
            {"method": "gptq"},
            "q_proj of 192 x 64 .*groups of 128; use `group_",
        ),
        ("embedding", "kv2", {"method": "bnb-nf4"}, "down_proj of 64 x 160 .* blocks of 64 inputs"),
        ("embedding", "kv8", {"method": "gptq", "symmetric": True}, "`symmetric` goes with awq"),
        ("embedding", "kv8", {"method": "fp8", "fast": True}, "fp8 is fast: `fast` goes with bnb-"),
        ("embedding", "kv8", {"method": "fp8", "form": "causal-lm"}, "has one form"),
        ("reranker", "kv8", {"method": "fp8", "form": "two-rows"}, "form should be one of"),
        ("embedding", "kv8", {"method": "fp8", "calibration": "x.txt"}, "runs no texts"),
        ("embedding", "kv8", {"method": "fp8", "device": "cuda"}, "`device` goes with gptq"),
        ("embedding", "kv8", {"method": "awq", "calibration": "no.txt"}, "no.txt cannot be read"),
    ],
)
def test_refused(checkpoints, tmp_path, task, geometry, options, message):
    with pytest.raises(InputError, match=message):
        embedport.quantize_checkpoint(checkpoints(geometry, task), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_dry_run_knows_the_bytes(quantized, checkpoints, tmp_path, method):
    written = load_file(quantized(method) / "model.safetensors")
    estimate = estimate_checkpoint(checkpoints("kv8"), tmp_path / "out", Options(method))
    # A matrix of NF4 has some JSON, too.
    slack = 14 * 40 if method == "bnb-nf4" else 0
    assert estimate.bytes == pytest.approx(size_of(written), abs=slack)
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_knows_the_bytes_of_a_classifier(quantized, checkpoints, tmp_path):
    """It has one row in place of a head."""
    folder = quantized("w8a8", "reranker", "kv2", form="sequence-classification", fast=True)
    options = Options("w8a8", form="sequence-classification", fast=True)
    estimate = estimate_checkpoint(checkpoints("kv2", "reranker"), tmp_path / "out", options)
    assert estimate.bytes == size_of(load_file(folder / "model.safetensors"))


def size_of(tensors):
    return sum(each.nbytes for each in tensors.values())


def test_a_dry_run_refuses_what_the_run_would(exported, tmp_path):
    with pytest.raises(CheckpointError, match="it is an artifact; give the checkpoint"):
        estimate_checkpoint(exported("kv8"), tmp_path / "out", Options("fp8"))
    with pytest.raises(CheckpointError, match="it is an artifact; give the checkpoint"):
        estimate_onnx(exported("kv8"), tmp_path / "out", OnnxOptions())


def test_the_card_says_how(quantized):
    card = (quantized("awq") / "README.md").read_text()
    assert "awq+gptaq, heads rotated: 14 matrices int4 in groups of 128, with zero points" in card
    assert "calibrated on 6 texts of" in card
    calibration = {"texts": 6, "tokens": 40, "source": "built-in", "sha256": "ab"}
    formats = {f"m{i}": "int4/32s" for i in range(8)}
    words = recipe_words(
        {"formats": formats, "algorithm": "gptq", "calibration": calibration}, "reranker"
    )
    assert "8 matrices int4 in groups of 32, no zero points" in words
    assert "calibrated on 6 pairs of 40 tokens" in words


def test_quantized_already(quantized, tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: the checkpoint is quantized already"):
        embedport.quantize_checkpoint(quantized("gptq"), tmp_path / "out", method="awq")


def test_nothing_half_written(checkpoints, copied, tmp_path):
    source = copied(checkpoints("kv8"))
    tensors = load_file(source / "model.safetensors")
    tensors["layers.1.mlp.down_proj.weight"][3, 5] = float("nan")
    save_file(tensors, source / "model.safetensors")
    before = set(tmp_path.iterdir())
    for method in ("bnb-int8", "bnb-nf4", "w8a8", "fp8"):
        with pytest.raises(CheckpointError, match=r"layers.1.mlp.down_proj.weight holds NaN"):
            embedport.quantize_checkpoint(
                source, tmp_path / "out", method=method, fast=method in ("bnb-nf4", "w8a8")
            )
    assert set(tmp_path.iterdir()) == before


def test_replaced_by_force_only(checkpoints, tmp_path):
    source, out = checkpoints("kv8"), tmp_path / "out"
    embedport.quantize_checkpoint(source, out, method="w8a8", fast=True)
    with pytest.raises(InputError, match="exists; choose another place"):
        embedport.quantize_checkpoint(source, out, method="fp8")
    artifact = embedport.quantize_checkpoint(source, out, method="fp8", force=True)
    assert artifact.manifest.precision == "fp8"


def test_shards(tmp_path):
    """Several files, odd sizes, rows piece by piece: what safetensors reads is what was written."""
    generator = np.random.default_rng(0)
    tensors = {
        f"tensor.{i}": generator.integers(-9, 9, shape).astype(dtype)
        for i, (shape, dtype) in enumerate(
            [
                *(((7, 8), np.float32), ((3,), np.int8), ((16, 4), np.float16)),
                *(((5, 1), np.float16), ((), np.uint8), ((2,), np.int64)),
                *(((40, 8), np.int32), ((1, 3), np.float32)),
            ]
        )
    }
    with ShardWriter(tmp_path, len(tensors), shard_bytes=1000) as shards:
        for name, each in tensors.items():
            pieces = [each[:2], each[2:]] if each.ndim == 2 else [each]
            shards.add_rows(name, each.dtype, each.shape, pieces)
    found = read_headers(tmp_path)
    assert len({info.file for info in found.values()}) == 2
    assert found.keys() == tensors.keys()
    for name, info in found.items():
        with safe_open(info.file, "pt") as shard:
            np.testing.assert_array_equal(shard.get_tensor(name).numpy(), tensors[name])
