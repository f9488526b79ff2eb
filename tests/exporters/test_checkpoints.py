"""Quantized checkpoints: opened by the libraries that own the formats, read back bit for bit."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import embedport
from embedport.demo.samples import builtin_pairs, builtin_samples
from embedport.errors import CheckpointError, InputError
from embedport.exporters.checkpoints.packing import gptq_parts, packed_parts
from embedport.exporters.checkpoints.shards import ShardWriter
from embedport.exporters.onnx.calibrated import quantize_layers
from embedport.exporters.onnx.formats import Format, matrices
from embedport.exporters.onnx.texts import tokenize_samples
from embedport.files import read_headers
from embedport.prompts import EmbeddingTokenizer, RerankerTokenizer
from embedport.quantize.rtn import quantize_rtn
from embedport.quantize.schemes import QuantScheme
from embedport.quantize.stored import StoredWeights, unpack
from embedport.spec import ModelSpec
from embedport.weights import Weights

SCRIPT = Path(__file__).with_name("reload.py")
METHODS = ("bnb-int8", "bnb-nf4", "awq", "w8a8", "fp8")
TEXTS = [sample.text for sample in builtin_samples() if len(sample.text) < 200][:6]
PAIRS = [(each.query, each.document) for each in builtin_pairs() if len(each.document) < 200][:6]
PREFIX = {"embedding": "", "reranker": "model."}
needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="gptqmodel and optimum are not installed; they need an environment of their own",
)


@pytest.fixture(scope="session")
def quantized(checkpoints, tmp_path_factory):
    """A function (method, task, geometry, **options) -> the written folder, cached."""
    made = {}

    def make(method, task="embedding", geometry="kv8", **options):
        key = (method, task, geometry, json.dumps(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("quantized") / f"{task}-{method}"
            source = checkpoints(geometry, task)
            if method in ("gptq", "awq"):
                options["calibration"] = calibration(task, tmp_path_factory.mktemp("texts"))
            made[key] = embedport.quantize_checkpoint(source, folder, method=method, **options)
        return made[key].folder

    return make


def calibration(task, folder):
    """A few short texts, or pairs: the tests ask for speed, not for quality."""
    path = folder / "calibration.jsonl"
    if task == "embedding":
        rows = [{"text": text, "prompt": "query"} for text in TEXTS]
    else:
        rows = [{"query": query, "document": document} for query, document in PAIRS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_rows(folder, task):
    path = folder / "tokenizer.json"
    if task == "embedding":
        prompt = embedport.query_prompt(
            "Given a web search query, retrieve relevant passages that answer the query"
        )
        return EmbeddingTokenizer(path, 4096).encode(TEXTS, prompt).ids
    return RerankerTokenizer(path, 4096).encode(PAIRS).ids


def reload(jobs, folder):
    """Run jobs in a fresh process: key to result."""
    folder.mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(SCRIPT), str(folder / "jobs.json"), str(folder / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(np.load(folder / "out.npz"))


def job(key, loader, folder, rows):
    rows = [ids.tolist() if isinstance(ids, np.ndarray) else ids for ids in rows]
    return {"key": key, "loader": loader, "folder": str(folder), "rows": rows}


@pytest.fixture(scope="session")
def reloaded(quantized, tmp_path_factory):
    """What transformers and sentence-transformers give, all from one fresh process."""
    jobs = []
    for method in METHODS:
        embedder, reranker = quantized(method), quantized(method, "reranker")
        classifier = quantized(method, "reranker", form="sequence-classification")
        rows, pairs = token_rows(embedder, "embedding"), token_rows(reranker, "reranker")
        jobs += [
            job(f"{method} embedding", "vectors", embedder, rows),
            job(f"{method} reranker", "causal_logits", reranker, pairs),
            job(f"{method} classifier", "classifier_logits", classifier, pairs),
            job(f"{method} sentences", "sentence_vectors", embedder, TEXTS),
            job(f"{method} cross-encoder", "cross_encoder_logits", classifier, PAIRS),
        ]
    return reload(jobs, tmp_path_factory.mktemp("reloaded"))


# the straightforward evaluation: each matrix as the numbers it stands for, in fp32


def nibbles(words):
    """int32 [n, m] to [n, 8 m], one by one."""
    values = words.to(torch.int64)[..., None] >> (4 * torch.arange(8))
    return (values & 15).reshape(len(words), -1)


def dequantize(parts, bits):
    """A matrix's stored tensors to float32 [out, in]; written down here once more."""
    if "qweight" in parts:
        if bits == 8:
            octets = parts["qweight"].T.contiguous().view(torch.uint8)
            codes, middle = octets.to(torch.int64), 128
        else:
            codes, middle = nibbles(parts["qweight"].T), 8
        scales = parts["scales"].T.float()
        return (codes - middle) * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    if "weight_packed" in parts:
        codes, scales = nibbles(parts["weight_packed"]), parts["weight_scale"].float()
        return (codes - 8) * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
    if "weight_scale" in parts:
        return parts["weight"].float() * parts["weight_scale"].float()
    if "SCB" in parts:
        return parts["weight"].float() * parts["SCB"].float()[:, None] / 127
    from bitsandbytes.functional import QuantState, dequantize_4bit

    stats = {name.removeprefix("weight."): value for name, value in parts.items()}
    state = QuantState.from_dict(
        {k: v for k, v in stats.items() if k != "weight"}, torch.device("cpu")
    )
    return dequantize_4bit(parts["weight"], state).float()


def plain_tensors(folder, task):
    """The checkpoint's tensors as float32, by their `Qwen3Model` names."""
    bits = json.loads((folder / "config.json").read_text())["quantization_config"].get("bits")
    stored = {
        name.removeprefix(PREFIX[task]): value
        for name, value in load_file(folder / "model.safetensors").items()
    }
    plain, matrices = {}, {}
    for name, value in stored.items():
        matrix, separator, part = name.partition("_proj.")
        if separator:
            matrices.setdefault(f"{matrix}_proj", {})[part] = value
        else:
            plain[name] = value.float()
    return plain | {f"{k}.weight": dequantize(v, bits) for k, v in matrices.items()}


def rounded_inputs(method):
    """How a method rounds a Linear's inputs, token by token; None where it does not."""

    def int8(module, args):
        (x,) = args
        scale = x.abs().amax(-1, keepdim=True) / 127.5
        return (torch.clamp(torch.round(x / scale), -128, 127) * scale,)

    def float8(module, args):
        (x,) = args
        scale = x.abs().amax(-1, keepdim=True) / 448
        return ((x / scale).to(torch.float8_e4m3fn).float() * scale,)

    def bitsandbytes(module, args):
        # bitsandbytes: columns with an outlier stay in 16 bits, all others are rounded.
        (x,) = args
        outliers = (x.abs() >= 6).flatten(0, -2).any(0)
        kept = torch.where(outliers, 0, x)
        scale = kept.abs().amax(-1, keepdim=True) / 127
        return (torch.where(outliers, x, torch.round(kept / scale) * scale),)

    return {"w8a8": int8, "fp8": float8, "bnb-int8": bitsandbytes}.get(method)


def evaluate(folder, task, rows, hook=None):
    """Vectors, or logits of "yes" less "no", of the dequantized weights in fp32."""
    from transformers import Qwen3Config, Qwen3Model

    values = json.loads((folder / "config.json").read_text())
    del values["quantization_config"]
    tensors = plain_tensors(folder, task)
    head = tensors.pop("lm_head.weight", tensors["embed_tokens.weight"])
    score = tensors.pop("score.weight", None)
    model = Qwen3Model(Qwen3Config.from_dict(values)).float().eval()
    model.load_state_dict(tensors, strict=True)
    for module in model.modules():
        if hook is not None and isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook)
    with torch.no_grad():
        last = torch.stack(
            [model(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0, -1] for ids in rows]
        )
    if task == "embedding":
        return torch.nn.functional.normalize(last, dim=1).numpy()
    if score is None:
        tokenizer = RerankerTokenizer(folder / "tokenizer.json", 4096).tokenizer
        yes, no = (tokenizer.token_to_id(word) for word in ("yes", "no"))
        score = head[yes] - head[no]
    return (last @ score.flatten()).numpy()


def smallest_cosine(a, b):
    return float((a * b).sum(axis=1).min())


def largest_difference(a, b):
    """Of the probabilities of two lists of logits."""
    return float(np.abs(1 / (1 + np.exp(-a)) - 1 / (1 + np.exp(-b))).max())


@pytest.mark.parametrize("method", METHODS)
def test_transformers_loads_it(quantized, reloaded, method):
    hook = rounded_inputs(method)
    folder = quantized(method)
    expected = evaluate(folder, "embedding", token_rows(folder, "embedding"), hook)
    assert smallest_cosine(reloaded[f"{method} embedding"], expected) >= 0.9999
    folder = quantized(method, "reranker")
    expected = evaluate(folder, "reranker", token_rows(folder, "reranker"), hook)
    assert largest_difference(reloaded[f"{method} reranker"], expected) < 2e-3
    # One logit is worth the two rows.
    assert (
        largest_difference(reloaded[f"{method} classifier"], reloaded[f"{method} reranker"]) < 1e-3
    )


@pytest.mark.parametrize("method", METHODS)
def test_sentence_transformers_loads_it(quantized, reloaded, method):
    # Activations stay as they are there, but for bitsandbytes, whose own operator rounds them.
    hook = rounded_inputs(method) if method == "bnb-int8" else None
    folder = quantized(method)
    expected = evaluate(folder, "embedding", token_rows(folder, "embedding"), hook)
    assert smallest_cosine(reloaded[f"{method} sentences"], expected) >= 0.9999
    # The CrossEncoder renders the folder's template.
    folder = quantized(method, "reranker", form="sequence-classification")
    expected = evaluate(folder, "reranker", token_rows(folder, "reranker"), hook)
    assert largest_difference(reloaded[f"{method} cross-encoder"], expected) < 2e-3


@needs_gptqmodel
def test_gptqmodel_loads_it(quantized, tmp_path):
    embedder, reranker = quantized("gptq"), quantized("gptq", "reranker")
    rows, pairs = token_rows(embedder, "embedding"), token_rows(reranker, "reranker")
    found = reload(
        [
            job("embedding", "vectors", embedder, rows),
            job("reranker", "causal_logits", reranker, pairs),
        ],
        tmp_path,
    )
    expected = evaluate(embedder, "embedding", rows)
    assert smallest_cosine(found["embedding"], expected) >= 0.9999
    expected = evaluate(reranker, "reranker", pairs)
    assert largest_difference(found["reranker"], expected) < 2e-3


# the same integers everywhere


def stored_integers(folder, bits):
    """Matrix to its codes uint8 [out, in], unpacked word by word."""
    tensors = load_file(folder / "model.safetensors")
    found = {}
    for name, words in tensors.items():
        matrix, _, part = name.removeprefix("model.").rpartition(".")
        if part not in ("qweight", "weight_packed"):
            continue
        words = (words.T if part == "qweight" else words).contiguous()
        codes = nibbles(words) if bits == 4 else words.view(torch.uint8)
        found[matrix] = codes.numpy().astype(np.uint8)
    return found


@pytest.mark.parametrize(
    ("method", "bits", "precision", "task"),
    [
        ("gptq", 4, "int4", "embedding"),
        ("gptq", 4, "int4", "reranker"),
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


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_holds_the_cores_own_codes(quantized, checkpoints, tmp_path, bits):
    options = {"bits": bits, "group_size": 32}
    folder = quantized("gptq", **options)
    source = ModelSpec.from_checkpoint(checkpoints("kv8"))
    weights = Weights(source)
    scheme = QuantScheme(bits, 32, symmetric=True, scale_dtype="float16")
    rows = tokenize_samples(source, source.max_length, calibration("embedding", tmp_path))
    formats = dict.fromkeys(matrices(source), Format(scheme))
    core = quantize_layers(weights, weights, formats, rows, tmp_path / "layers", lambda: None)
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


def test_compressed_tensors_unpacks_the_same_numbers():
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = QuantScheme(4, 32, symmetric=True, scale_dtype="bfloat16")
    weight = np.random.default_rng(0).standard_normal((16, 96), np.float32)
    tensor = quantize_rtn(weight, scheme)
    parts: dict[str, torch.Tensor | None] = {
        # torch cannot take numpy's bfloat16; the scales are its values in fp32 as well.
        name: torch.from_numpy(each.astype(np.float32) if name == "weight_scale" else each)
        for name, each in packed_parts(tensor).items()
    }
    preset = preset_name_to_scheme("W4A16", ["Linear"])
    assert preset.weights is not None
    preset.weights.group_size = 32
    found = PackedQuantizationCompressor.decompress(parts, preset)["weight"]
    assert found is not None
    np.testing.assert_array_equal(found.numpy(), tensor.dequantize())


@pytest.mark.parametrize("method", ["bnb-int8", "bnb-nf4", "bnb-nf4 double"])
def test_bitsandbytes_tensors_are_transformers_own(quantized, checkpoints, tmp_path, method):
    from transformers import AutoModel, BitsAndBytesConfig

    name, _, double = method.partition(" ")
    folder = quantized(name, double_quant=True) if double else quantized(name)
    if name == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=bool(double),
            bnb_4bit_compute_dtype="bfloat16",
        )
    model = AutoModel.from_pretrained(
        checkpoints("kv8"), quantization_config=config, dtype=torch.bfloat16
    )
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


# what stays, and what the folder says


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize("method", [*METHODS, "gptq"])
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


@pytest.mark.parametrize("method", ["w8a8", "fp8"])
def test_eight_bits_keep_the_function(quantized, checkpoints, reference_vectors, method):
    """Folded factors leave no trace: norms are stored in 16 bits without a loss."""
    folder = quantized(method)
    rows = token_rows(folder, "embedding")
    expected = reference_vectors(checkpoints("kv8"), rows)
    cosine = smallest_cosine(evaluate(folder, "embedding", rows), expected)
    assert cosine > {"w8a8": 0.9998, "fp8": 0.998}[method]


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


def test_the_template_gives_the_rerankers_own_tokens(quantized):
    from transformers import AutoTokenizer

    folder = quantized("fp8", "reranker")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    for (query, document), expected in zip(PAIRS, token_rows(folder, "reranker"), strict=True):
        messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_16_bit_dtype(checkpoints, tmp_path, dtype):
    """fp16 stays fp16; fp32 becomes bf16."""
    source = checkpoints("kv8", dtype=dtype)
    embedport.quantize_checkpoint(source, tmp_path / "out", method="w8a8")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    expected = {"float16": torch.float16, "float32": torch.bfloat16}[dtype]
    assert {each.dtype for each in tensors.values()} == {expected, torch.int8}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(expected).removeprefix("torch.")


@pytest.mark.parametrize(
    ("task", "geometry", "options", "message"),
    [
        ("embedding", "kv8", {"method": "gguf"}, "method should be one of bnb-int8, .* 'gguf'"),
        ("embedding", "kv8", {"method": "awq", "bits": 8}, "awq has 4 bits, found --bits 8"),
        ("embedding", "kv8", {"method": "gptq", "bits": 3}, "gptq has 4 or 8 bits"),
        ("embedding", "kv8", {"method": "fp8", "group_size": 64}, "--group-size goes with gptq, a"),
        ("embedding", "kv8", {"method": "gptq", "group_size": 48}, "group_size should be one of"),
        (
            "embedding",
            "kv8",
            {"method": "gptq", "double_quant": True},
            "goes with --method bnb-nf4",
        ),
        (
            "embedding",
            "kv2",
            {"method": "gptq"},
            "q_proj of 192 x 64 .*groups of 128; use --group-",
        ),
        ("embedding", "kv8", {"method": "fp8", "form": "causal-lm"}, "has one form"),
        ("reranker", "kv8", {"method": "fp8", "form": "two-rows"}, "form should be one of"),
        ("embedding", "kv8", {"method": "fp8", "calibration": "x.txt"}, "runs no texts"),
        ("embedding", "kv8", {"method": "awq", "calibration": "no.txt"}, "no.txt cannot be read"),
    ],
)
def test_refused(checkpoints, tmp_path, task, geometry, options, message):
    with pytest.raises(InputError, match=message):
        embedport.quantize_checkpoint(checkpoints(geometry, task), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


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
            embedport.quantize_checkpoint(source, tmp_path / "out", method=method)
    assert set(tmp_path.iterdir()) == before


def test_replaced_by_force_only(checkpoints, tmp_path):
    source, out = checkpoints("kv8"), tmp_path / "out"
    embedport.quantize_checkpoint(source, out, method="w8a8")
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


def test_command_line(checkpoints, tmp_path):
    command = [sys.executable, "-m", "embedport", "quantize", str(checkpoints("kv8"))]
    command += ["-o", str(tmp_path / "out"), "--method"]
    done = subprocess.run([*command, "w8a8", "--json"], capture_output=True, text=True, check=True)
    facts = json.loads(done.stdout)
    assert (facts["method"], facts["task"]) == ("w8a8", "embedding")
    done = subprocess.run([*command, "w4"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "method should be one of" in done.stderr
