"""fp16 on models whose activations fp16 cannot hold."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import embedport
from embedport.checkpoint.tensor_files import SINGLE
from embedport.errors import CheckpointError, VerificationError
from embedport.exporters.calibration.fp16_overflow import LIMIT, choose_fp16
from embedport.exporters.graph.precision import PRECISIONS, RESIDUAL
from embedport.exporters.onnx import export as export_module
from embedport.texts.samples import builtin_samples

TEXTS = [sample.text for sample in builtin_samples()]


def scale(folder, **factors):
    """Multiply tensors, or one row of one, where the factor is (row, factor)."""
    tensors = load_file(folder / SINGLE)
    for name, factor in factors.items():
        tensor = tensors[f"{name}.weight"]
        row, factor = factor if isinstance(factor, tuple) else (slice(None), factor)
        tensor[row] = (tensor[row].astype(np.float32) * factor).astype(tensor.dtype)
    save_file(tensors, folder / SINGLE)


@pytest.fixture
def massive_residual(checkpoints, copied):
    """One channel of the residual stream goes beyond 65504 from layer 1 on; the norms damp it."""
    folder = copied(checkpoints("kv1"))
    scale(
        folder,
        **{
            "layers.1.mlp.up_proj": 100,
            "layers.1.mlp.gate_proj": 10,
            "layers.1.mlp.down_proj": (5, 3e4),
            "layers.2.input_layernorm": (5, 1e-3),
            "layers.2.post_attention_layernorm": (5, 1e-3),
            "norm": (5, 1e-4),
        },
    )
    return folder


@pytest.fixture
def massive_swiglu(checkpoints, copied):
    """The SwiGLU's product goes beyond 65504 in layer 1, and down_proj scales it back."""
    folder = copied(checkpoints("kv1"))
    scale(
        folder,
        **{
            "layers.1.mlp.up_proj": 3e4,
            "layers.1.mlp.gate_proj": 1e3,
            "layers.1.mlp.down_proj": 1e-6,
        },
    )
    return folder


@pytest.mark.parametrize(
    ("kind", "dialect"),
    [
        ("massive_residual", "standard"),
        ("massive_swiglu", "ort"),
        pytest.param("massive_residual", "ort", marks=pytest.mark.slow),
        pytest.param("massive_swiglu", "standard", marks=pytest.mark.slow),
    ],
)
def test_no_overflow(tmp_path, request, kind, dialect, reference_vectors):
    folder = request.getfixturevalue(kind)
    artifact = embedport.export(folder, tmp_path / "out", precision="fp16", dialect=dialect)
    assert artifact.manifest.graph is not None
    kept = artifact.manifest.graph.kept_in_fp32
    assert RESIDUAL in kept
    assert "layers.1.mlp.down_proj" in kept
    assert "layers.0.mlp.down_proj" not in kept
    embedder = embedport.load(tmp_path / "out", device="cpu")
    assert isinstance(embedder, embedport.Embedder)
    vectors = embedder.encode(TEXTS)
    assert np.isfinite(vectors).all()
    expected = reference_vectors(folder, embedder.tokenizer.encode(TEXTS).ids)
    assert (vectors * expected).sum(axis=1).min() >= 0.999


@pytest.mark.parametrize("kind", ["massive_residual", "massive_swiglu"])
def test_without_the_calibration_it_would_overflow(tmp_path, request, kind, monkeypatch):
    """The written graph is run before it is put in place: NaN never becomes an artifact."""
    monkeypatch.setattr(export_module, "choose_fp16", lambda *_: PRECISIONS["fp16"])
    with pytest.raises(VerificationError, match=r"layers\.[12] gives .* NaN or infinite"):
        embedport.export(request.getfixturevalue(kind), tmp_path / "out", precision="fp16")
    assert list(tmp_path.glob("*out*")) == []


def test_nothing_is_kept_without_need(artifacts):
    assert artifacts("kv1", precision="fp16").artifact.manifest.graph.kept_in_fp32 == ()
    assert artifacts("kv1", precision="bf16").artifact.manifest.graph.kept_in_fp32 == (RESIDUAL,)


def test_choice():
    calm = {"layers.0.self_attn.v_proj": 10.0, "residual": LIMIT - 1}
    assert choose_fp16(calm, 2) == PRECISIONS["fp16"]
    over = LIMIT + 1
    assert choose_fp16({"layers.1.mlp.residual": over}, 2).kept_in_fp32 == (RESIDUAL,)
    kept = choose_fp16({"layers.1.mlp.gate_proj": over, "layers.10.self_attn.o_proj": over}, 11)
    assert kept.kept_in_fp32 == (
        RESIDUAL,
        "layers.1.mlp.down_proj",
        "layers.1.mlp.gate_proj",
        "layers.10.self_attn.o_proj",
    )
    with pytest.raises(CheckpointError, match=r"v_proj reaches .* export with `precision` bf16"):
        choose_fp16({"layers.0.self_attn.v_proj": over}, 1)


def test_a_weight_beyond_fp16(checkpoints, copied, tmp_path):
    folder = copied(checkpoints("kv1"))
    scale(folder, **{"layers.0.self_attn.k_norm": 1e6})
    with pytest.raises(CheckpointError, match=r"k_norm\.weight has values beyond 65504"):
        embedport.export(folder, tmp_path / "out", precision="fp16")
    assert list(tmp_path.glob("*out*")) == []


def test_damaged_weights(checkpoints, copied, tmp_path):
    folder = copied(checkpoints("kv1"))
    scale(folder, **{"layers.0.self_attn.o_proj": np.nan})
    with pytest.raises(CheckpointError, match="even in fp32; the checkpoint is damaged"):
        embedport.export(folder, tmp_path / "out", precision="fp16")
