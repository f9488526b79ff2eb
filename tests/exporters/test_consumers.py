"""Files of `--for`, read with onnxruntime, transformers and OpenVINO as the consumers do."""

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

import embedport
from embedport.artifact.folder import Artifact
from embedport.errors import ArtifactError, InputError, VerificationError
from embedport.exporters.onnx import consumers
from embedport.runtimes.batching import pad
from embedport.texts.samples import builtin_pairs, builtin_samples
from tests.synthetic import TINY, edit, write_checkpoint

TEXTS = [sample.text for sample in builtin_samples()[:6]] + [""]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()[:6]]
ALL = ("sentence-transformers", "older-onnxruntime")
# 4-bit products round activations, in another order in each kernel.
MOST_APART = {"fp32": 1e-5, "fp16": 1e-3, "int8": 1e-3, "int4": 1e-2}


@pytest.fixture(scope="module")
def exported(checkpoints, tmp_path_factory):
    """A function (task, consumers, **options of export) -> a loaded artifact, cached."""
    made = {}

    def make(task, consumers, **options):
        if options.get("precision") == "int4":
            options["fast"] = True  # with a table in 4 bits, too
        key = (task, consumers, json.dumps(options))
        if key not in made:
            folder = tmp_path_factory.mktemp("consumers") / "artifact"
            embedport.export(checkpoints("blocks", task), folder, consumers=consumers, **options)
            made[key] = embedport.load(folder, device="cpu")
        return made[key]

    return make


def run(folder, ids, mask, name="model.onnx"):
    """All outputs of a graph in plain onnxruntime, by name."""
    import onnxruntime

    session = onnxruntime.InferenceSession(
        folder / "onnx" / name, providers=["CPUExecutionProvider"]
    )
    names = [value.name for value in session.get_outputs()]
    outputs = session.run(names, {"input_ids": ids, "attention_mask": mask})
    return dict(zip(names, outputs, strict=True))


def padded(rows, left):
    ids, mask = pad(rows)
    if left:
        for row, (line, real) in enumerate(zip(ids, mask, strict=True)):
            ids[row], mask[row] = np.roll(line, -real.sum()), np.roll(real, -real.sum())
    return ids, mask


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("precision", MOST_APART)
def test_an_embedder_for_older_versions(exported, precision, left):
    embedder = exported("embedding", ALL, precision=precision)
    ids, mask = padded(embedder.tokenizer.encode(TEXTS).ids, left)
    found = run(embedder.artifact.folder, ids, mask)
    assert list(found) == ["last_hidden_state", "sentence_embedding"]
    expected = embedder.encode(TEXTS)
    limit = MOST_APART[precision]
    assert np.abs(found["sentence_embedding"] - expected).max() < limit
    last = found["last_hidden_state"][np.arange(len(ids)), _last(mask)]
    last /= np.linalg.norm(last, axis=1, keepdims=True)
    assert np.abs(last - expected).max() < limit


def _last(mask):
    return mask.shape[1] - 1 - np.argmax(mask[:, ::-1], axis=1)


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param(each, marks=[pytest.mark.slow] if each in ("fp16", "int4") else [])
        for each in MOST_APART
    ],
)
def test_a_reranker_for_older_versions(exported, precision):
    reranker = exported("reranker", ALL, precision=precision)
    found = run(reranker.artifact.folder, *pad(reranker.tokenizer.encode(PAIRS).ids))
    assert list(found) == ["logits", "score"]  # fastembed and TEI read the first
    assert found["logits"].shape == (len(PAIRS), 1)
    sigmoid = 1 / (1 + np.exp(-found["logits"][:, 0]))
    np.testing.assert_allclose(sigmoid, found["score"], atol=1e-6, rtol=0)
    limit = MOST_APART[precision]
    np.testing.assert_allclose(found["score"], reranker.score(PAIRS), atol=limit, rtol=0)


@pytest.mark.parametrize("precision", MOST_APART)
def test_operators_of_older_versions(exported, precision):
    """Opset 21, IR 10, operators that onnxruntime has had since before 1.20, no functions."""
    folder = exported("embedding", ALL, precision=precision).artifact.folder
    model = onnx.load(folder / "onnx" / "model.onnx", load_external_data=False)
    assert model.ir_version == 10
    assert {each.domain: each.version for each in model.opset_import} == {
        "": 21,
        "com.microsoft": 1,
    }
    assert not model.functions
    used = {(node.domain, node.op_type) for node in model.graph.node}
    fused = {name for domain, name in used if domain}
    standard = {name for domain, name in used if not domain} - {"SimplifiedLayerNormalization"}
    assert all(onnx.defs.has(name, max_inclusive_version=21) for name in standard)
    assert fused <= {
        *("GroupQueryAttention", "SkipSimplifiedLayerNormalization", "QuickGelu"),
        *("MatMulIntegerToFloat", "MatMulNBits"),
    }


def test_each_token_is_that_of_transformers(exported, checkpoints):
    import torch
    from transformers import AutoModel

    embedder = exported("embedding", ("sentence-transformers",))
    rows = embedder.tokenizer.encode(TEXTS).ids
    found = run(embedder.artifact.folder, *pad(rows))["last_hidden_state"]
    model = AutoModel.from_pretrained(checkpoints("blocks"), dtype=torch.float32)
    for row, states in zip(rows, found, strict=True):
        with torch.no_grad():
            expected = model(input_ids=torch.from_numpy(row)[None]).last_hidden_state[0]
        np.testing.assert_allclose(states[: len(row)], expected.numpy(), atol=1e-4, rtol=0)


def test_a_reranker_as_a_classifier(exported):
    """By default: what CrossEncoder and ORTModelForSequenceClassification read."""
    from transformers import AutoConfig, AutoTokenizer

    reranker = exported("reranker", ())
    folder = reranker.artifact.folder
    config = AutoConfig.from_pretrained(folder)
    assert config.num_labels == 1
    assert config.architectures == ["Qwen3ForSequenceClassification"]
    assert config.sentence_transformers["activation_fn"].endswith("Sigmoid")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer is not None
    rows = reranker.tokenizer.encode(PAIRS).ids
    for (query, document), row in zip(PAIRS, rows, strict=True):
        messages = [
            {"role": "query", "content": query},
            {"role": "document", "content": document},
        ]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer(text)["input_ids"] == row.tolist()
    found = run(folder, *pad(rows))
    assert {name: value.shape for name, value in found.items()} == {
        "score": (len(PAIRS),),
        "logits": (len(PAIRS), 1),
    }
    np.testing.assert_allclose(
        1 / (1 + np.exp(-found["logits"][:, 0])), reranker.score(PAIRS), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    ("precision", "name", "dtype"),
    [("fp32", "model", "fp32"), ("fp16", "model_fp16", "fp16"), ("int8", "model_quantized", "q8")],
)
def test_transformers_js(exported, precision, name, dtype):
    folder = exported("embedding", ("transformers.js",), precision=precision).artifact.folder
    files = {path.name for path in (folder / "onnx").iterdir()}
    assert files == {"embedport.onnx", "model.onnx", f"{name}.onnx", f"{name}.onnx_data"}
    model = onnx.load(folder / "onnx" / f"{name}.onnx", load_external_data=False)
    places = [
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    ]
    assert {*places} == {f"{name}.onnx_data"}
    settings = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert settings == {"dtype": dtype, "use_external_data_format": True}
    # Where it looks for the length of a text; the checkpoint's file says 131,072.
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["model_max_length"] == 32768


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_openvino(exported, task):
    openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed")
    model = exported(task, ("openvino",))
    texts = TEXTS if task == "embedding" else PAIRS
    path = model.artifact.folder / "openvino" / "openvino_model.xml"
    hints = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path, "CPU", hints)
    names = [output.any_name for output in compiled.outputs]
    if task == "embedding":
        assert names == ["last_hidden_state", "sentence_embedding"]
        expected, name = model.encode(texts), "sentence_embedding"
    else:
        assert names == ["logits", "score"]
        expected, name = model.score(texts), "score"
    ids, mask = pad(model.tokenizer.encode(texts).ids)
    found = compiled({"input_ids": ids, "attention_mask": mask})[name]
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)
    assert (model.artifact.folder / "onnx" / "model.onnx").is_file()


def test_the_graphs_share_their_weights(exported, copied):
    """The own graph gives what it gives without `--for`, and the files are checked."""
    embedder = exported("embedding", ("sentence-transformers",))
    plain = exported("embedding", ())
    np.testing.assert_array_equal(embedder.encode(TEXTS), plain.encode(TEXTS))
    manifest = embedder.artifact.manifest
    assert manifest.graph.path == "onnx/embedport.onnx"
    assert manifest.graph.shared.paths == ("onnx/model.onnx",)
    assert {*manifest.files} - {*plain.artifact.manifest.files} == {"onnx/embedport.onnx"}
    sizes = [
        model.artifact.manifest.files["onnx/model.onnx_data"].size for model in (embedder, plain)
    ]
    assert sizes[0] == sizes[1]
    folder = copied(embedder.artifact.folder)
    with (folder / "onnx" / "model.onnx").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(ArtifactError, match=r"onnx/model\.onnx should have"):
        Artifact.open(folder)


@pytest.mark.parametrize("spoil", [np.negative, lambda values: values * np.nan])
@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_another_result_is_no_artifact(checkpoints, tmp_path, monkeypatch, task, spoil):
    """The graph that consumers open is compared; in OpenVINO nothing else looks for NaN."""
    run = consumers.run_texts

    def spoilt(path, ids):
        return {name: spoil(values) for name, values in run(path, ids).items()}

    monkeypatch.setattr(consumers, "run_texts", spoilt)
    with pytest.raises(VerificationError, match=r"embedport's own graph|a cosine of"):
        embedport.export(checkpoints("blocks", task), tmp_path / "out", consumers=["triton"])
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_not_pooled(checkpoints, copied, tmp_path):
    """Software that pools itself gets the tokens' vectors alone, and all other is refused."""
    folder = copied(checkpoints("blocks"))
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    with pytest.raises(InputError, match="tei reads pooled vectors, and the model leaves its prom"):
        embedport.export(folder, tmp_path / "out", consumers=["tei"])
    artifact = embedport.export(folder, tmp_path / "out", consumers=["sentence-transformers"])
    embedder = embedport.load_embedder(artifact.folder, device="cpu")
    ids, mask = pad(embedder.tokenizer.encode(TEXTS).ids)
    found = run(artifact.folder, ids, mask)
    assert list(found) == ["last_hidden_state"]
    last = found["last_hidden_state"][np.arange(len(ids)), _last(mask)]
    last /= np.linalg.norm(last, axis=1, keepdims=True)
    np.testing.assert_allclose(last, embedder.encode(TEXTS), atol=1e-5, rtol=0)


def test_older_versions_mask_no_attention(checkpoints, copied, tmp_path):
    folder = copied(checkpoints("blocks"))
    edit(folder / "config.json", is_causal=False)
    with pytest.raises(InputError, match=r"1\.20, and attention to both sides or in"):
        embedport.export(folder, tmp_path / "out", consumers=["tei"])


REFUSED = [
    (
        "embedding",
        {"consumers": ["word2vec"]},
        "`consumers` should be one of sentence-transformers",
    ),
    ("embedding", {"consumers": ["tei"], "precision": "bf16"}, "tei .* bf16"),
    ("embedding", {"consumers": ["triton"], "precision": "int8-weight"}, "4 bits only"),
    ("embedding", {"consumers": ["tei"], "precision": "auto"}, "a search may choose"),
    ("embedding", {"consumers": ["tei"], "dialect": "standard"}, "`dialect` ort"),
    ("embedding", {"consumers": ["transformers.js"], "precision": "bf16"}, "no file name for bf16"),
    ("embedding", {"consumers": ["transformers.js"], "dim": 16}, "`dim` does not shorten"),
    ("embedding", {"consumers": ["tei"], "outputs": "hidden"}, "without `outputs` hidden"),
    ("embedding", {"consumers": ["openvino"], "precision": "int8"}, "`dialect` standard"),
    ("reranker", {"consumers": ["fastembed"]}, "without the reranker's template"),
    ("reranker", {"consumers": ["transformers.js"]}, "no class for Qwen3's rerankers"),
]


@pytest.mark.parametrize(
    ("options", "size"), [({"precision": "int8"}, 128), ({"precision": "int4", "fast": True}, 64)]
)
def test_a_table_has_whole_groups(small_tokenizer, tmp_path, options, size):
    """At a width of 160, groups of 128 would be read as groups of 80: a score is 0.04 off."""
    folder = write_checkpoint(
        tmp_path / "m", replace(TINY, hidden_size=160), "reranker", small_tokenizer
    )
    message = f"triton .* the embedding table's groups of {size} do not divide its width, 160: use"
    with pytest.raises(InputError, match=message):
        embedport.export(folder, tmp_path / "artifact", consumers=["triton"], **options)


@pytest.mark.parametrize(("task", "options", "message"), REFUSED)
def test_refused(checkpoints, tmp_path, task, options, message):
    with pytest.raises(InputError, match=message):
        embedport.export(checkpoints("blocks", task), tmp_path / "artifact", **options)
    assert not list(tmp_path.iterdir())
