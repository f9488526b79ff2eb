"""A checkpoint's weights are gigabytes: whatever can be wrong without them is found before."""

import json
import shutil
import sys

import pytest

import embedport
from embedport.errors import EmbedportError, InputError, MissingPackageError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(checkpoints, tmp_path_factory, monkeypatch):
    """A hub with a checkpoint: (its folder in the cache, what was asked of it)."""
    import huggingface_hub

    source = checkpoints("kv8")
    folder = tmp_path_factory.mktemp("snapshots") / COMMIT
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    asked = []

    def download(repo_id, revision, allow_patterns):
        weights = "*.safetensors" in allow_patterns
        asked.append((revision, weights))
        if weights:
            shutil.copy(source / "model.safetensors", folder)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return folder, asked


def test_bad_options(hub, tmp_path):
    """Others: tests/exporters/test_quantized.py."""
    with pytest.raises(InputError):
        embedport.export("me/qwen3", tmp_path / "out", precision="int4", group_size=48)
    assert hub[1] == [(None, False)]  # no weights


@pytest.mark.parametrize(
    "options",
    [{"method": "gguf"}, {"method": "awq", "bits": 8}, {"method": "w8a8", "form": "causal-lm"}],
)
def test_bad_methods(hub, tmp_path, options):
    with pytest.raises(InputError):
        embedport.quantize_checkpoint("me/qwen3", tmp_path / "out", **options)
    assert hub[1] == [(None, False)]


def test_existing_output(hub, tmp_path):
    with pytest.raises(InputError, match="exists; choose another place"):
        embedport.export("me/qwen3", tmp_path)
    with pytest.raises(InputError, match="exists; choose another place"):
        embedport.quantize_checkpoint("me/qwen3", tmp_path, method="gptq")
    assert hub[1] == [(None, False)] * 2


def test_missing_packages(hub, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingPackageError, match="onnxruntime is not installed"):
        embedport.export("me/qwen3", tmp_path / "out")
    with pytest.raises(MissingPackageError, match="onnxruntime is not installed"):
        embedport.quantize_checkpoint("me/qwen3", tmp_path / "out", method="gptq")
    monkeypatch.setitem(sys.modules, "ir_measures", None)
    with pytest.raises(MissingPackageError, match="ir_measures is not installed"):
        embedport.export(
            "me/qwen3",
            tmp_path / "out",
            precision="auto",
            max_ndcg_loss=0.1,
            retrieval="builtin",
        )
    assert hub[1] == [(None, False)] * 3


def test_what_only_its_library_reads(hub, tmp_path):
    path = hub[0] / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(config))
    with pytest.raises(EmbedportError, match="gives no weights to export"):
        embedport.export("me/qwen3", tmp_path / "out")
    assert hub[1] == [(None, False)]


def test_the_weights_are_of_the_same_commit(hub, tmp_path):
    artifact = embedport.export("me/qwen3", tmp_path / "out", revision="main")
    assert hub[1] == [("main", False), (COMMIT, True)]
    assert (artifact.manifest.source.id, artifact.manifest.source.revision) == (
        "me/qwen3",
        COMMIT,
    )


def test_where_only_the_weights_tell_the_task(hub, tmp_path):
    """Without modules.json and an index it is in the names of the tensors."""
    (hub[0] / "modules.json").unlink()
    artifact = embedport.export("me/qwen3", tmp_path / "out", dim=32)
    assert artifact.manifest.task == "embedding"
    assert hub[1][:2] == [(None, False), (COMMIT, True)]
