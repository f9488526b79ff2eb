"""The error layer by layer, on graphs of every kind and on a layer that was changed."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from embedport.errors import InputError
from embedport.runtimes import read_info
from embedport.texts.samples import builtin_pairs, builtin_samples
from embedport.validation.layers import TEXTS, TOKENS, layer_errors, sample_rows
from embedport.validation.opening import open_live


def errors_of(folders, task):
    """The errors of an artifact against its checkpoint."""
    reference = open_live(folders.checkpoint, task=task, max_length=512)
    if task == "embedding":
        rows = reference.token_ids(builtin_samples()[:40])
        assert {len(row) % 2 for row in sample_rows(rows)} == {0, 1}
    else:
        rows = reference.token_ids(builtin_pairs()[:12])
    return layer_errors(read_info(folders.artifact), reference, rows)


@pytest.mark.parametrize(
    ("task", "dialect"),
    [
        ("embedding", "standard"),
        ("reranker", "ort"),
        pytest.param("embedding", "ort", marks=pytest.mark.slow),
        pytest.param("reranker", "standard", marks=pytest.mark.slow),
    ],
)
def test_fp32_is_exact_in_every_layer(folders, task, dialect):
    errors = errors_of(folders(task, dialect=dialect), task)
    assert [each.layer for each in errors] == [0, 1, 2]
    for each in errors:
        assert 0 <= each.relative_error_mean <= each.relative_error_max < 2e-6
        assert each.cosine_min > 1 - 1e-10


@pytest.mark.parametrize(
    ("precision", "low", "high"),
    [("fp16", 1e-4, 3e-3), ("bf16", 1e-3, 2e-2), ("int8", 3e-3, 0.1), ("int8-weight", 1e-3, 0.1)],
)
def test_the_error_is_the_precisions(folders, precision, low, high):
    """16 bits are emulated; weights in groups come with even rows, the last token twice."""
    errors = errors_of(folders("embedding", precision=precision), "embedding")
    for each in errors[1:]:
        assert low < each.relative_error_mean < high
        assert each.relative_error_mean <= each.relative_error_max < 3 * high


def test_a_graph_that_gives_each_tokens_vector(folders):
    errors = errors_of(folders("embedding", outputs="hidden"), "embedding")
    assert len(errors) == 3
    assert max(each.relative_error_max for each in errors) < 2e-6


@pytest.mark.parametrize("dim", [48, pytest.param(None, marks=pytest.mark.slow)])
def test_a_rotated_stream_is_rotated_back(folders, dim):
    plain = errors_of(folders("embedding", precision="int8", rotate=False), "embedding")
    rotated = errors_of(folders("embedding", precision="int8", dim=dim), "embedding")
    for a, b in zip(plain, rotated, strict=True):
        assert b.relative_error_mean == pytest.approx(a.relative_error_mean, rel=0.7)


def test_a_rotated_reranker_cannot_be_compared(folders):
    assert errors_of(folders("reranker", precision="int8", rotate=True), "reranker") == ()


def test_a_changed_layer_is_where_the_error_begins(folders, tmp_path):
    made = folders("embedding")
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "changed"))
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["layers.1.mlp.down_proj.weight"] = -tensors["layers.1.mlp.down_proj.weight"]
    save_file(tensors, shard, metadata={"format": "pt"})
    reference = open_live(checkpoint, task="embedding", max_length=512)
    rows = reference.token_ids(builtin_samples()[:8])
    embedding, first, second = layer_errors(read_info(made.artifact), reference, rows)
    assert max(embedding.relative_error_max, first.relative_error_max) < 2e-6
    assert second.relative_error_mean > 1e-3


def test_nan_stays_nan(folders, tmp_path):
    made = folders("embedding")
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "damaged"))
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    tensors["layers.0.mlp.down_proj.weight"][:] = np.inf
    save_file(tensors, shard, metadata={"format": "pt"})
    reference = open_live(checkpoint, task="embedding", max_length=512)
    rows = reference.token_ids(builtin_samples()[:2])
    errors = layer_errors(read_info(made.artifact), reference, rows)
    assert errors[0].relative_error_max < 1e-6
    assert np.isnan([errors[1].relative_error_mean, errors[1].cosine_min]).all()


def test_a_checkpoint_with_fewer_layers(folders, tmp_path):
    made = folders("embedding")
    checkpoint = Path(shutil.copytree(made.checkpoint, tmp_path / "shallow"))
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    config["layer_types"] = (config.get("layer_types") or [])[:1] or None
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (shard,) = checkpoint.glob("*.safetensors")
    tensors = load_file(shard)
    first = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    save_file(first, shard, metadata={"format": "pt"})
    reference = open_live(checkpoint, task="embedding", max_length=512)
    rows = reference.token_ids(builtin_samples()[:2])
    with pytest.raises(InputError, match="the artifact has 2 layers and the reference 1"):
        layer_errors(read_info(made.artifact), reference, rows)


def test_the_sample_is_bounded():
    rows = [np.arange(length) for length in range(1, 600)]
    sample = sample_rows(rows)
    assert len(sample) == TEXTS
    assert max(map(len, sample)) == TOKENS
    assert sample[0].tolist() == [0]
    assert sample[-1].tolist() == list(range(599))[-TOKENS:]
    assert [row.tolist() for row in sample_rows([[5, 6]])] == [[5, 6]]
    assert sample_rows([[5, 6]])[0].dtype == np.int64
