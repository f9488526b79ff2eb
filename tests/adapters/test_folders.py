"""Adapters' folders: what of them runs, what is refused, what artifacts say of them."""

import json
import pickle
import shutil
import sys
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

import embedport
from embedport.artifact.manifest import Manifest
from embedport.checkpoint.adapter import Adapter
from embedport.checkpoint.lora import AdaptedWeights
from embedport.checkpoint.spec import ModelSpec
from embedport.cli.app import app
from embedport.errors import CheckpointError, InputError
from embedport.runtimes.info import hash_model, read_info
from embedport.validation.table import GATE as TABLE_GATE
from embedport.validation.tensors import GATE as TENSORS_GATE
from tests.synthetic import edit

from .conftest import PAIRS, TEXTS, cosines, passes, save_with_adapter, scores, vectors

pytestmark = pytest.mark.filterwarnings("ignore")


def run(*arguments):
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_an_embedder_that_sentence_transformers_saved(bases, tmp_path):
    """Its own pipeline runs, on the base that it names."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(bases()), prompts={"query": "find: ", "document": ""}, device="cpu"
    )
    folder = save_with_adapter(model, tmp_path / "adapter")
    # Of the model that was saved: transformers 5.5 and earlier open the folder without its adapter.
    expected = {"query": model.encode_query(TEXTS), "document": model.encode_document(TEXTS)}
    artifact = embedport.export(folder, tmp_path / "onnx")
    for source in (folder, artifact.folder):
        for prompt, wanted in expected.items():
            assert cosines(vectors(source, prompt), wanted).min() >= 0.999999
    report = embedport.validate(artifact.folder, folder, TEXTS, device="cpu")
    assert report.passed
    assert report.library.startswith("sentence-transformers")


def test_a_pickle_keeps_its_adapter(bases, adapters):
    """A worker would give the base's vectors."""
    embedder = embedport.load_embedder(bases(), device="cpu", adapter=adapters(bases()))
    again = pickle.loads(pickle.dumps(embedder))
    np.testing.assert_array_equal(again.encode(TEXTS), embedder.encode(TEXTS))


@pytest.mark.parametrize("kind", ["text-generation", "sequence-classification"])
def test_a_reranker_that_sentence_transformers_saved(bases, tmp_path, kind):
    from sentence_transformers import CrossEncoder

    options, base = {}, bases("reranker")
    if kind == "sequence-classification":
        base = tmp_path / "base"
        AutoModelForSequenceClassification.from_pretrained(
            bases("reranker"), num_labels=1
        ).save_pretrained(base)
        tokenizer: Any = AutoTokenizer.from_pretrained(bases("reranker"))
        tokenizer.save_pretrained(base)
        options = {"modules_to_save": ["score"]}
    encoder = CrossEncoder(str(base), device="cpu")
    folder = save_with_adapter(encoder, tmp_path / "adapter", **options)
    expected = encoder.predict(PAIRS, batch_size=1)
    artifact = embedport.export(folder, tmp_path / "onnx")
    for source in (folder, artifact.folder):
        assert np.abs(scores(source) - expected).max() < 1e-5
    assert passes(artifact, folder)


def test_the_pipeline_of_the_base(bases, adapters):
    """An adapter that PEFT saved has none of its own."""
    spec = ModelSpec.from_checkpoint(bases(), adapter=adapters(bases()))
    assert spec.source.pipeline == bases()
    assert spec.prompts == ModelSpec.from_checkpoint(bases()).prompts


def test_a_tokenizer_that_is_not_the_bases(bases, adapters, copied):
    adapter = copied(adapters(bases()))
    text = (bases() / "tokenizer.json").read_text()
    (adapter / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=1))
    ModelSpec.from_checkpoint(bases(), adapter=adapter)
    (adapter / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(CheckpointError, match="differs from the base's"):
        ModelSpec.from_checkpoint(bases(), adapter=adapter)


def test_a_chat_template_that_is_not_the_bases(bases, adapters, copied):
    base = copied(bases("reranker"), "base")
    adapter = copied(adapters(bases("reranker"), "classifier", labels=1))
    chat = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(chat)
    for folder in (base, adapter):
        shutil.copy(bases("reranker") / "tokenizer.json", folder)
    for text in (None, chat, chat + "!"):
        if text is not None:
            (adapter / "chat_template.jinja").write_text(text)
        if text == chat + "!":
            with pytest.raises(CheckpointError, match="or its chat template, differs from the ba"):
                ModelSpec.from_checkpoint(base, adapter=adapter)
        else:
            spec = ModelSpec.from_checkpoint(base, adapter=adapter)
            assert spec.inputs.form == "messages"


def test_the_task_of_an_adapter(bases, adapters, copied):
    """PEFT's task type says it where neither modules.json nor a model card does."""
    base = copied(bases("reranker"), "base")
    (base / "README.md").unlink(missing_ok=True)
    adapter = adapters(bases("reranker"), "bare")
    assert ModelSpec.from_checkpoint(base, adapter=adapter).task == "embedding"


def test_an_artifact_and_its_reference(bases, adapters, tmp_path):
    """The command line: made, shown, validated; another adapter, or none, is noticed.

    The embedding table and a norm, which `validate` compares by themselves, are the adapter's too.
    """
    changed = {"target_modules": ["embed_tokens", "o_proj"], "modules_to_save": ["norm"]}
    base, adapter = bases(), adapters(bases(), **changed)
    folder = tmp_path / "onnx"
    run("export", "onnx", base, "--adapter", adapter, "-o", folder)
    manifest = Manifest.from_json(folder / "embedport.json")
    record = manifest.source.adapter
    assert record is not None
    assert (record.id, record.rank, record.alpha) == (str(adapter), 4, 16)
    own = {path.name for path in adapter.glob("adapter_*")}
    assert manifest.source.files.keys() == own | {"model.safetensors"}
    assert len(own) == 2
    assert f"--reference {base} --adapter {adapter}" in (folder / "README.md").read_text()
    shown = run("inspect", folder).stdout
    assert "rank 4, alpha 16" in " ".join(shown.split())
    shown = json.loads(run("inspect", base, "--adapter", adapter, "--json").stdout)
    assert shown["adapter"]["targets"] == list(record.targets)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    options = ("--reference", base, "--device", "cpu", "--no-record", "--input", file)
    assert run("validate", folder, "--adapter", adapter, *options).exit_code == 0
    assert run("validate", folder, *options).exit_code == 1
    other = adapters(bases(), **changed, seed=1)
    assert run("validate", folder, "--adapter", other, *options).exit_code == 1

    recorded = tmp_path / "file.reference"
    asked = ("-o", recorded, "--device", "cpu", "--input", file)
    run("reference", base, "--adapter", adapter, *asked)
    report = embedport.validate(folder, reference=recorded, device="cpu", record=False)
    assert report.passed
    found = {gate.name: gate.value for gate in report.gates}
    assert (found[TABLE_GATE], found[TENSORS_GATE]) == (0, 0)
    recorded.unlink()
    run("reference", base, "--adapter", other, *asked)
    with pytest.raises(InputError, match=r"whose adapter_model.safetensors has the sha256"):
        embedport.validate(folder, reference=recorded, device="cpu", record=False)


@pytest.mark.parametrize("task", ["embedding", "reranker"])
def test_a_wrong_scaling_is_noticed(bases, adapters, tmp_path, monkeypatch, task):
    base = bases(task)
    adapter = adapters(base, "bare" if task == "embedding" else "causal", use_rslora=True)
    assert embedport.load(base, adapter=adapter, device="cpu")
    values = Adapter.__dict__["_lora"]

    def without_root(self, module, shape):
        found = values(self, module, shape)
        return type(found)(found.a, found.b, self.alpha / self.rank, found.is_table)

    monkeypatch.setattr(Adapter, "_lora", without_root)
    wrong = embedport.export(base, tmp_path / "wrong", adapter=adapter)
    monkeypatch.undo()
    right = embedport.export(base, tmp_path / "right", adapter=adapter)
    assert not passes(wrong, base, adapter=adapter)
    assert passes(right, base, adapter=adapter)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, and only plain LoRA is merged"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is"),
        ({"target_parameters": ["q_proj.weight"]}, "target_parameters is"),
        ({"kasa_config": {"beta": 1}}, "kasa_config is"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', and only 'LORA' is merged"),
        ({"peft_type": "PROMPT_TUNING"}, "peft_type is 'PROMPT_TUNING'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', by which PEFT changes"),
        ({"new_scaling": 2}, "the key 'new_scaling' is not known here"),
        ({"r": "4"}, "r should be a positive whole number, found '4'"),
        ({"r": 0}, "r should be a positive whole number, found 0"),
        ({"r": 8}, r"lora_A.weight should be BF16, F16, F32 of shape \[8, 64\]"),
        ({"lora_alpha": [1]}, "lora_alpha should be a positive number"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern should be ranks by pattern"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern is not a regular expression"),
        ({"target_modules": r"(.*)*q"}, "target_modules should have patterns of"),
        ({"target_modules": ".*" * 9}, "target_modules should have patterns of"),
        ({"target_modules": None}, "target_modules should be names, or a pattern, found None"),
        ({"target_modules": ["q_proj", 7]}, "target_modules should be names, or a pattern, found"),
        ({"modules_to_save": "norm"}, "modules_to_save should be names, found 'norm'"),
        ({"target_modules": ["q_proj"]}, "v_proj has lora_A and lora_B, and target_modules"),
        ({"target_modules": ["q_proj", "v_proj", "o_proj"]}, "o_proj should have lora_A and"),
        ({"modules_to_save": ["norm"]}, "lacks base_model.model.*norm.weight, of the modules_to"),
        ({"layers_to_transform": "0"}, "layers_to_transform should be numbers of layers"),
    ],
)
def test_configurations_refused(bases, adapters, copied, changes, message):
    adapter = copied(adapters(bases()))
    edit(adapter / "adapter_config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelSpec.from_checkpoint(bases(), adapter=adapter)
    assert str(adapter) in str(caught.value)


def rename(tensors, old, new):
    name = next(name for name in tensors if old in name)
    tensors[name.replace(old, new)] = tensors.pop(name)


TENSORS = {
    "magnitude": (lambda x: rename(x, "lora_B.weight", "lora_magnitude_vector"), "named"),
    "token adapter": (
        lambda x: x.update({"base_model.model.embed_tokens.token_adapter.deltas": np.ones(2)}),
        "token_adapter.deltas' should be named",
    ),
    "no prefix": (lambda x: rename(x, "base_model.model.", ""), "should be named base_model"),
    "no B": (
        lambda x: [x.pop(name) for name in list(x) if "2.self_attn.q_proj.lora_B" in name],
        "q_proj should have lora_A and lora_B, found lora_A only",
    ),
    "of no target": (
        lambda x: rename(x, "0.self_attn.q_proj.lora_B", "0.self_attn.o_proj.lora_A"),
        "_B",
    ),
    "a table's": (
        lambda x: [
            rename(
                x,
                f"1.self_attn.v_proj.lora_{part}.weight",
                f"1.self_attn.v_proj.lora_embedding_{part}",
            )
            for part in "AB"
        ],
        "should be named like that of a linear layer",
    ),
    "layer beyond": (lambda x: rename(x, "layers.2.self_attn.q", "layers.7.self_attn.q"), "q_proj"),
    "whole, of no module": (
        lambda x: x.update({"base_model.model.dense.weight": np.ones((2, 2), np.float32)}),
        "dense.weight belongs to no module of this model",
    ),
    "whole, of an adapted module": (
        lambda x: x.update(
            {"base_model.model.layers.0.self_attn.q_proj.weight": np.ones((64, 64), np.float32)}
        ),
        "should be in base_layer",
    ),
    "bias": (
        lambda x: x.update(
            {"base_model.model.layers.0.self_attn.o_proj.bias": np.ones(64, np.float32)}
        ),
        "o_proj.bias belongs to no module",
    ),
    "whole, of another shape": (
        lambda x: x.update({"base_model.model.norm.weight": np.ones(63, np.float32)}),
        r"norm\.weight should be BF16, F16, F32 of shape \[64\]",
    ),
    "more outputs": (
        lambda x: x.update({n: np.concatenate([v, v]) for n, v in x.items() if "lora_B" in n}),
        r"q_proj\.lora_B\.weight should be BF16, F16, F32 of shape \[64, 4\]",
    ),
    "integers": (lambda x: x.update({n: v.astype(np.int32) for n, v in x.items()}), "found I32"),
}


@pytest.mark.parametrize(("change", "message"), TENSORS.values(), ids=TENSORS)
def test_tensors_refused(bases, adapters, copied, change, message):
    adapter = copied(adapters(bases()))
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelSpec.from_checkpoint(bases(), adapter=adapter)
    assert str(adapter) in str(caught.value)


def test_every_file_of_an_adapter_counts_for_a_models_hash(bases, adapters, copied):
    """Shards that another adapter made are not kept: they would be of another model."""
    adapter = copied(adapters(bases()))
    path = adapter / "adapter_model.safetensors"
    hashes = {hash_model(read_info(bases())), hash_model(read_info(bases(), adapter=adapter))}
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    hashes.add(hash_model(read_info(bases(), adapter=adapter)))
    edit(adapter / "adapter_config.json", lora_alpha=7)
    hashes.add(hash_model(read_info(bases(), adapter=adapter)))
    assert len(hashes) == 4


def test_the_defaults_of_a_configuration(bases, adapters, copied):
    adapter = copied(adapters(bases(), r=8, lora_alpha=8, use_rslora=True))
    expected = ModelSpec.from_checkpoint(bases(), adapter=adapter).plan_merge()
    assert {lora.scaling for lora in expected.added.values()} == {8 / 8**0.5}
    edit(adapter / "adapter_config.json", r=None, lora_alpha=None)
    assert ModelSpec.from_checkpoint(bases(), adapter=adapter).plan_merge() == expected
    edit(adapter / "adapter_config.json", use_rslora=None, lora_alpha=1)
    plain = ModelSpec.from_checkpoint(bases(), adapter=adapter).plan_merge()
    assert {lora.scaling for lora in plain.added.values()} == {0.125}


def test_a_score_without_rows(bases, adapters, copied):
    base, adapter = copied(bases(), "base"), copied(adapters(bases()))
    (base / "modules.json").unlink()
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path) | {"base_model.model.score.weight": np.array(1, np.float32)}, path)
    with pytest.raises(CheckpointError, match=r"score\.weight should have one row, yes, or two"):
        ModelSpec.from_checkpoint(base, adapter=adapter)


def test_folders_refused(bases, adapters, copied, quantized, tmp_path):
    adapter = copied(adapters(bases()))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model.bin is not read, save it as safet"):
        ModelSpec.from_checkpoint(bases(), adapter=adapter)
    with pytest.raises(InputError, match="is not an adapter: it has no adapter_config"):
        ModelSpec.from_checkpoint(bases(), adapter=bases())
    with pytest.raises(InputError, match="is an adapter itself: give `adapter` with the"):
        ModelSpec.from_checkpoint(adapter, adapter=adapter)
    with pytest.raises(InputError, match="is an artifact: give `adapter` with the checkpoint"):
        embedport.load(quantized("gptq"), adapter=adapter, device="cpu")


def test_a_base_that_is_not_there(bases, adapters, copied, tmp_path):
    adapter = copied(adapters(bases()))
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=rf"gone.*give the base, and {adapter} as `adapter`"):
        embedport.load(adapter, device="cpu")
    assert embedport.load(bases(), adapter=adapter, device="cpu")
    for name in ("a" * 300, "~nobody/base", "\0"):
        edit(adapter / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=r"give the base, and .* as `adapter`"):
            embedport.load(adapter, device="cpu")
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(bases()), revision=7)
    with pytest.raises(CheckpointError, match="revision should be a text, found 7"):
        embedport.load(adapter, device="cpu")
    for name in (None, "", 7):
        edit(adapter / "adapter_config.json", base_model_name_or_path=name)
        with pytest.raises(CheckpointError, match=f"should name the base, found {name!r}"):
            embedport.load(adapter, device="cpu")


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_a_quantized_base(adapters, bases, copied, quantized, method):
    base = copied(quantized(method))
    (base / "embedport.json").unlink()
    with pytest.raises(CheckpointError, match=r"the base is quantized by .*: give the original"):
        ModelSpec.from_checkpoint(base, adapter=adapters(bases()))


@pytest.mark.parametrize("place", [".", "checkpoint-9"])
def test_an_adapter_in_the_checkpoints_folder(bases, adapters, copied, tmp_path, place):
    base = copied(bases(), "model")
    (base / place).mkdir(exist_ok=True)
    for path in adapters(bases()).glob("adapter_*"):
        (base / place / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"give `adapter` .*model"):
        ModelSpec.from_checkpoint(base)
    spec = ModelSpec.from_checkpoint(base, adapter=base / place)
    assert len(spec.plan_merge().added) == 6
    artifact = embedport.export(base, tmp_path / "onnx", adapter=base / place)
    assert passes(artifact, base, adapter=base / place)


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("reranker", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("reranker", {"target_modules": ["q_proj", "lm_head"]}),
        ("reranker", {"modules_to_save": ["embed_tokens"]}),
        ("embedding", {"target_modules": ["q_proj", "lm_head"]}),
    ],
)
def test_a_tied_head_is_not_adapted(bases, adapters, task, options):
    """PEFT's model differs there before and after merging."""
    base = bases(task)
    adapter = adapters(base, "causal", **options)
    with pytest.raises(CheckpointError, match="which are one tensor in the base"):
        AdaptedWeights(ModelSpec.from_checkpoint(base, adapter=adapter))


@pytest.mark.parametrize("kind", ["bare", "causal"])
def test_an_embedder_has_no_head_to_adapt(bases, adapters, kind):
    base = bases("embedding", tied=False)
    adapter = adapters(base, kind, target_modules=["q_proj", "lm_head"])
    spec = ModelSpec.from_checkpoint(base, adapter=adapter)
    assert {name.split(".")[-2] for name in spec.plan_merge().added} == {"q_proj"}


@pytest.mark.parametrize(("kind", "labels"), [("bare", None), ("causal", None), ("classifier", 1)])
def test_all_linear_as_it_was_asked_for(bases, adapters, copied, kind, labels):
    """PEFT writes the names instead, and reads both."""
    base = bases("embedding" if kind == "bare" else "reranker", tied=False)
    adapter = copied(adapters(base, kind, labels=labels, target_modules="all-linear"))
    expected = ModelSpec.from_checkpoint(base, adapter=adapter).plan_merge()
    edit(adapter / "adapter_config.json", target_modules="all-linear")
    assert ModelSpec.from_checkpoint(base, adapter=adapter).plan_merge() == expected


def test_a_classifiers_artifact(bases, adapters, tmp_path):
    base = bases("reranker")
    targets = ["q_proj", "v_proj", "lm_head"]  # it has no lm_head
    adapter = adapters(base, "classifier", labels=1, target_modules=targets)
    artifact = embedport.export(base, tmp_path / "onnx", adapter=adapter)
    report = embedport.validate(
        artifact.folder, base, adapter=adapter, pairs=PAIRS, device="cpu", record=False
    )
    assert report.passed
    assert report.library.startswith("sentence-transformers")


@pytest.mark.parametrize(
    ("task", "kind", "options"),
    [
        ("embedding", "causal", {"modules_to_save": ["lm_head"]}),
        ("reranker", "bare", {"target_modules": "all-linear"}),
    ],
)
def test_an_adapter_trained_in_another_class(bases, adapters, tmp_path, task, kind, options):
    base = bases(task)
    adapter = adapters(base, kind, **options)
    artifact = embedport.export(base, tmp_path / "onnx", adapter=adapter, task=task)
    assert passes(artifact, base, adapter=adapter)
    assert not passes(artifact, base)


@pytest.mark.parametrize("method", ["gptq", "w8a8"])
def test_quantized_weights_are_the_merged_ones(bases, adapters, tmp_path, method):
    adapter = adapters(bases(), target_modules="all-linear")
    options: dict[str, Any] = {"group_size": 32, "bits": 8} if method == "gptq" else {}
    options["calibration"] = tmp_path / "texts.txt"
    options["calibration"].write_text("a text about tea\n")
    artifact = embedport.quantize_checkpoint(
        bases(), tmp_path / "out", method=method, adapter=adapter, **options
    )
    merged = vectors(bases(), adapter=adapter)
    found = vectors(artifact.folder)
    assert cosines(found, merged).min() > 0.99
    assert artifact.manifest.source.adapter is not None


@pytest.mark.parametrize(
    "options", [{"precision": "int8"}, {"precision": "int4", "algorithm": "gptq"}]
)
def test_quantized_graphs_are_of_the_merged_weights(bases, adapters, tmp_path, options):
    adapter = adapters(bases(), target_modules="all-linear")
    if options["precision"] == "int4":
        (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
        options = options | {"calibration": tmp_path / "texts.txt"}
    artifact = embedport.export(bases(), tmp_path / "onnx", adapter=adapter, **options)
    merged = vectors(bases(), adapter=adapter)
    found = vectors(artifact.folder)
    assert cosines(found, merged).min() > (0.99 if options["precision"] == "int8" else 0.9)


def test_the_other_commands_take_it(bases, adapters, tmp_path, monkeypatch):
    adapter = adapters(bases(), target_modules="all-linear")
    expected = vectors(bases(), adapter=adapter)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    common = ("--adapter", adapter, "--device", "cpu", "--input", file)
    run("encode", bases(), *common, "-o", tmp_path / "vectors.npy")
    run("encode", bases(), *common, "-o", f"{tmp_path}/vectors/")
    for path in (tmp_path / "vectors.npy", tmp_path / "vectors" / "000000.npy"):
        np.testing.assert_allclose(np.load(path), expected, atol=1e-5)
    # The graph has the weights; the engine is made of it.
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    tensorrt = ("export", "tensorrt", bases(), "--adapter", adapter, "-o", tmp_path / "engine")
    assert run(*tensorrt).exit_code == 0
    quantize = ("quantize", bases(), "--adapter", adapter, "--method", "w8a8", "--fast")
    assert run(*quantize, "-o", tmp_path / "w8a8").exit_code == 0
    for name in ("engine", "w8a8"):
        found = vectors(tmp_path / name)
        assert cosines(found, expected).min() > 0.99

    base = bases("reranker")
    adapter = adapters(base, "causal", modules_to_save=["lm_head"])
    expected = scores(base, adapter=adapter)
    out = run("rerank", base, *PAIRS[0], "--adapter", adapter, "--device", "cpu", "--json").stdout
    assert json.loads(out)["score"] == pytest.approx(expected[0], abs=1e-6)


def test_hub_ids(bases, adapters, tmp_path, monkeypatch):
    """Base and adapter of the hub, each of its own revision; the base may be named by the other."""
    import huggingface_hub

    commits = {"me/base": "a" * 40, "me/adapter": "b" * 40}
    asked = []
    for name, source in {"me/base": bases(), "me/adapter": adapters(bases())}.items():
        shutil.copytree(source, tmp_path / commits[name])
    edit(
        tmp_path / commits["me/adapter"] / "adapter_config.json",
        base_model_name_or_path="me/base",
        revision="v2",
    )

    def download(repo_id, revision, allow_patterns):
        asked.append((repo_id, revision))
        return str(tmp_path / commits[repo_id])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    spec = ModelSpec.from_checkpoint("me/base@v1", adapter="me/adapter@v3")
    assert ("me/base", "v1") in asked
    assert ("me/adapter", "v3") in asked
    asked.clear()
    assert ModelSpec.from_checkpoint("me/adapter").source == spec.source
    assert ("me/base", "v2") in asked
    artifact = embedport.export("me/adapter", tmp_path / "onnx")
    record = artifact.manifest.source
    assert record.revision == commits["me/base"]
    assert record.options == (
        *("--reference", f"me/base@{commits['me/base']}"),
        *("--adapter", f"me/adapter@{commits['me/adapter']}"),
    )


def test_an_adapter_of_the_reference_alone(bases, adapters, tmp_path, caplog):
    base, adapter = bases(), adapters(bases(), target_modules="all-linear")
    artifact = embedport.export(base, tmp_path / "onnx")
    assert not passes(artifact, base, adapter=adapter)
    assert f"without an adapter, and the reference has {adapter}" in caplog.text
