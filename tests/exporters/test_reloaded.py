"""Quantized checkpoints opened by the libraries that own the formats, in a fresh process.

What they give is compared with a straightforward evaluation of the numbers that the stored tensors
stand for, in fp32.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedport.texts.prompts import RerankerTokenizer

SCRIPT = Path(__file__).with_name("reload.py")
METHODS = ("bnb-int8", "bnb-nf4", "awq", "w8a8", "fp8")
ROUNDED = ("w8a8", "fp8")  # activations too, by compressed-tensors
PREFIX = {"embedding": "", "reranker": "model."}
needs_gptqmodel = pytest.mark.skipif(
    importlib.util.find_spec("gptqmodel") is None or importlib.util.find_spec("optimum") is None,
    reason="gptqmodel and optimum are not installed; they need an environment of their own",
)


def marked(method, *others):
    """A case of a method; fp8 is slow, since w8a8 takes the same path in the same library."""
    return pytest.param(method, *others, marks=[pytest.mark.slow] if method == "fp8" else [])


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
    names = {"key": key, "loader": loader, "folder": str(folder)}
    return {**names, "rows": rows, "dtype": "float32"}


@pytest.fixture(scope="session")
def reloaded(request, short, quantized, tmp_path_factory):
    """The results of transformers and sentence-transformers, all from one fresh process."""
    # Of the methods that this run asks for: fp8 is marked slow.
    asked = {
        item.callspec.params["method"]
        for item in request.session.items
        if "reloaded" in item.fixturenames
    }
    jobs = []
    for method in sorted(asked):
        embedder, reranker = quantized(method), quantized(method, "reranker")
        classifier = quantized(method, "reranker", form="sequence-classification")
        rows, pairs = short.rows(embedder, "embedding"), short.rows(reranker, "reranker")
        jobs += [
            job(f"{method} embedding", "vectors", embedder, rows),
            job(f"{method} reranker", "causal_logits", reranker, pairs),
            job(f"{method} classifier", "classifier_logits", classifier, pairs),
            job(f"{method} sentences", "sentence_vectors", embedder, short.texts),
            job(f"{method} cross-encoder", "cross_encoder_logits", classifier, short.pairs),
        ]
        if method in ROUNDED:
            jobs += [
                job(
                    f"{method} rounded sentences", "rounded_sentence_vectors", embedder, short.texts
                ),
                job(
                    f"{method} rounded cross-encoder",
                    "rounded_cross_encoder_logits",
                    classifier,
                    short.pairs,
                ),
            ]
    return reload(jobs, tmp_path_factory.mktemp("reloaded"))


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
        zeros = torch.tensor([[8]])
        if "weight_zero_point" in parts:
            zeros = nibbles(parts["weight_zero_point"].T).T
            zeros = zeros.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
        return (codes - zeros) * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)
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
        # bitsandbytes casts to fp16; columns with an outlier stay so, all others are rounded.
        x = args[0].half().float()
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
    """The largest difference between the probabilities of two lists of logits."""
    return float(np.abs(1 / (1 + np.exp(-a)) - 1 / (1 + np.exp(-b))).max())


@pytest.mark.parametrize("method", [marked(method) for method in METHODS])
def test_transformers_loads_it(short, quantized, reloaded, method):
    hook = rounded_inputs(method)
    folder = quantized(method)
    expected = evaluate(folder, "embedding", short.rows(folder, "embedding"), hook)
    assert smallest_cosine(reloaded[f"{method} embedding"], expected) >= 0.9999
    folder = quantized(method, "reranker")
    expected = evaluate(folder, "reranker", short.rows(folder, "reranker"), hook)
    assert largest_difference(reloaded[f"{method} reranker"], expected) < 2e-3
    # One logit is worth the two rows.
    assert (
        largest_difference(reloaded[f"{method} classifier"], reloaded[f"{method} reranker"]) < 1e-3
    )


@pytest.mark.parametrize(
    ("method", "opened"),
    [*(marked(method, "") for method in METHODS), *(marked(m, "rounded ") for m in ROUNDED)],
)
def test_sentence_transformers_loads_it(short, quantized, reloaded, method, opened):
    # It leaves activations as they are unless it is told; bitsandbytes' own operator rounds them.
    hook = rounded_inputs(method) if opened or method == "bnb-int8" else None
    folder = quantized(method)
    expected = evaluate(folder, "embedding", short.rows(folder, "embedding"), hook)
    assert smallest_cosine(reloaded[f"{method} {opened}sentences"], expected) >= 0.9999
    # The CrossEncoder renders the folder's template.
    folder = quantized(method, "reranker", form="sequence-classification")
    expected = evaluate(folder, "reranker", short.rows(folder, "reranker"), hook)
    assert largest_difference(reloaded[f"{method} {opened}cross-encoder"], expected) < 2e-3


@needs_gptqmodel
def test_gptqmodel_loads_it(short, quantized, tmp_path):
    embedder, reranker = quantized("gptq"), quantized("gptq", "reranker")
    rows, pairs = short.rows(embedder, "embedding"), short.rows(reranker, "reranker")
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


@pytest.mark.parametrize("method", ["w8a8", "fp8"])
def test_eight_bits_keep_the_function(short, quantized, checkpoints, reference_vectors, method):
    """Folded factors leave no trace: norms are stored in 16 bits without a loss."""
    folder = quantized(method)
    rows = short.rows(folder, "embedding")
    expected = reference_vectors(checkpoints("kv8"), rows)
    cosine = smallest_cosine(evaluate(folder, "embedding", rows), expected)
    assert cosine > {"w8a8": 0.9998, "fp8": 0.998}[method]
