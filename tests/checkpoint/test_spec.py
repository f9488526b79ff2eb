"""ModelSpec: all six models of the family, other geometries, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import embedport
from embedport import ModelSpec
from embedport.artifact.layout import write_sentence_transformers
from embedport.checkpoint.hub import fetch
from embedport.checkpoint.rope import read_rope
from embedport.errors import CheckpointError, InputError
from tests.synthetic import DEFAULT_PROMPTS, QWEN3_0_6B, QWEN3_4B, QWEN3_8B, edit


@pytest.mark.parametrize("task", ["embedding", "reranker"])
@pytest.mark.parametrize(
    ("geometry", "parameters"),
    # The model cards' counts, a vocabulary of 151,665 at 4B and 8B.
    [
        (QWEN3_0_6B, 595_776_512),
        (replace(QWEN3_4B, vocab_size=151_665), 4_021_774_336),
        (replace(QWEN3_8B, vocab_size=151_665), 7_567_295_488),
    ],
)
def test_the_six_models(tmp_path, real_tokenizer, geometry, parameters, task):
    """Read from configuration alone, as it is fetched first from the hub."""
    from tests import synthetic

    config = synthetic._config(geometry, geometry.vocab_size, task, "bfloat16", real_tokenizer)
    (tmp_path / "config.json").write_text(json.dumps(config))
    if task == "embedding":
        write_sentence_transformers(tmp_path, geometry.hidden_size, DEFAULT_PROMPTS)
    else:
        (tmp_path / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n")
    spec = ModelSpec.from_checkpoint(tmp_path)
    assert spec.task == task
    assert (spec.hidden_size, spec.num_layers) == (geometry.hidden_size, geometry.num_layers)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim) == (
        geometry.num_heads,
        geometry.num_kv_heads,
        128,
    )
    assert spec.tied == geometry.tied
    assert spec.max_length == 32768
    head = 0 if geometry.tied or task == "embedding" else 151_665 * 4096
    assert spec.parameters == parameters + head
    if task == "reranker":
        assert spec.inputs.form == "instruct"
        return
    assert spec.prompts["document"] == ""
    assert spec.prompts["query"] == (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:"
    )


def test_rope_as_transformers_5_writes_it(checkpoints, copied):
    folder = copied(checkpoints())
    edit(
        folder / "config.json",
        rope_theta=None,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    assert ModelSpec.from_checkpoint(folder).rope.theta == 5000.0
    # Where both stand, transformers 5 takes the one inside.
    edit(folder / "config.json", rope_theta=7000.0)
    assert ModelSpec.from_checkpoint(folder).rope.theta == 5000.0


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 1.5},  # both bounds of the ramp beyond the last pair
        {"rope_theta": 4.0},
        {"original_max_position_embeddings": 5},  # both before the first
        {"original_max_position_embeddings": 64, "truncate": False},
        {"beta_fast": 2.0, "beta_slow": 2.0, "truncate": False},
        {"beta_fast": 1.0, "beta_slow": 3.0},
        {"factor": 1.0, "mscale": 2.0, "mscale_all_dim": 3.0},
        {"factor": 0.5},
        {"mscale": 2.0},
    ],
)
def test_yarn_as_transformers_computes_it(changes):
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0} | changes
    rope = read_rope({"rope_parameters": parameters}, Path("config.json"), 512)
    config = Qwen3Config(head_dim=32, max_position_embeddings=512, rope_parameters=parameters)
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](config, None)
    np.testing.assert_allclose(rope.frequencies(32), expected.numpy(), rtol=1e-5)
    assert rope.attention_factor == pytest.approx(factor)


def test_a_number_without_a_point(checkpoints, copied):
    """Writers other than Python's have one kind of number: JSON's 1 is 1.0."""
    folder = copied(checkpoints())
    edit(folder / "config.json", rms_norm_eps=1)
    eps = ModelSpec.from_checkpoint(folder).rms_norm_eps
    assert (eps, type(eps)) == (1, float)


def test_task_of_a_checkpoint_without_modules_json(checkpoints, copied):
    folder = copied(checkpoints(task="embedding"))
    (folder / "modules.json").unlink()
    assert ModelSpec.from_checkpoint(folder).task == "embedding"
    assert ModelSpec.from_checkpoint(folder, task="reranker").task == "reranker"
    assert ModelSpec.from_checkpoint(checkpoints(task="reranker")).task == "reranker"


def test_pooling_and_prompts_of_sentence_transformers(checkpoints, copied):
    folder = copied(checkpoints())
    edit(folder / "config_sentence_transformers.json", prompts={"query": "Q: ", "title": "T: "})
    prompts = ModelSpec.from_checkpoint(folder).prompts
    assert prompts == {"query": "Q: ", "title": "T: "}
    pooling = folder / "1_Pooling" / "config.json"
    for values in ({"pooling_mode": "lasttoken"}, {"embedding_dimension": 32}):
        pooling.write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r"embedding_dimension (should be|is)"):
            ModelSpec.from_checkpoint(folder)
    width = json.loads((folder / "config.json").read_text())["hidden_size"]
    pooling.write_text(json.dumps({"embedding_dimension": width, "pooling_mode": "lasttoken"}))
    assert ModelSpec.from_checkpoint(folder).task == "embedding"
    edit(pooling, pooling_mode=None, pooling_mode_mean_tokens=True)
    assert ModelSpec.from_checkpoint(folder).outputs.pooling == ("mean",)
    edit(pooling, pooling_mode="first")
    with pytest.raises(CheckpointError, match=r"1_Pooling.*pooling_mode should be one or more"):
        ModelSpec.from_checkpoint(folder)


def test_task_that_the_files_contradict(checkpoints, copied):
    folder = copied(checkpoints(task="embedding"))
    with pytest.raises(InputError, match=r"task is 'reranker', but modules\.json makes it a Sent"):
        ModelSpec.from_checkpoint(folder, task="reranker")
    (folder / "modules.json").unlink()
    edit(folder / "config.json", architectures=["Qwen3Model", "Qwen3ForTokenClassification"])
    with pytest.raises(CheckpointError, match="architectures should be one of Qwen3Model, Qwen3F"):
        ModelSpec.from_checkpoint(folder, task="embedding")


def test_max_length_is_the_smallest_of_the_files(checkpoints, copied):
    folder = copied(checkpoints())
    edit(folder / "tokenizer_config.json", model_max_length=1e30)
    assert ModelSpec.from_checkpoint(folder).max_length == 32768
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 512}')
    assert ModelSpec.from_checkpoint(folder).max_length == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type should be 'qwen3', found 'bert'"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size should be int, found '64'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers should be positive, found 0"),
        ({"num_hidden_layers": 2**31}, "num_hidden_layers should be 4,096 at most"),
        ({"intermediate_size": 70_000}, "intermediate_size should be 65,536 at most, found 70,000"),
        ({"head_dim": 272}, "head_dim should be a multiple of 16, 256 at most, found 272"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps should be positive, found nan"),
        ({"rms_norm_eps": True}, "rms_norm_eps should be float, found True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and only 'silu' or 'swish' is supported"),
        ({"attention_bias": 1}, "attention_bias should be bool, found 1"),
        ({"use_sliding_window": True, "max_window_layers": 1.5}, "should be a number of layers"),
        ({"layer_types": ["full_attention"]}, "layer_types should be 2 of full_attention or"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types should be 2 of"),
        ({"layer_types": ["full_attention", []]}, "layer_types should be 2 of"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "give no window; give both"),
        (
            {"use_sliding_window": True, "max_window_layers": 0, "is_causal": False},
            "a sliding window with is_causal false is not supported",
        ),
        ({"is_causal": "no"}, "is_causal should be bool, found 'no'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True, which"),
        ({"logit_scale": 2}, "the key 'logit_scale' is not known here"),
        ({"per_layer_config": {"0": {}}}, "the key 'per_layer_config' is not known here"),
        ({"is_encoder_decoder": True}, "the key 'is_encoder_decoder' is not known here"),
        ({"num_key_value_heads": 3}, r"num_attention_heads \(4\) should be a multiple of"),
        ({"rope_scaling": {"rope_type": "dynamic"}}, "type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "base": 2}}, "base is not known"),
        (
            {"rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 4}},
            "rope_theta should be above 1 with yarn, found 1",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 1e-310}},
            "beta_fast should be a positive number",
        ),
        ({"rope_scaling": [1]}, r"rope_scaling should be an object, found \[1\]"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported, only 1"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supp"),
        (
            {
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4,
                    "original_max_position_embeddings": 0.5,
                }
            },
            "original_max_position_embeddings should be a positive whole number, found 0.5",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4, "truncate": "no"}},
            "truncate should be true or false, found 'no'",
        ),
        ({"architectures": "Qwen3Model"}, "architectures should be a list of names"),
        ({"quantization_config": {"bits": 4}}, "quantized by None"),
    ],
)
def test_refused(checkpoints, copied, changes, message):
    folder = copied(checkpoints())
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        ModelSpec.from_checkpoint(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelSpec.from_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        ModelSpec.from_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not a hub id"):
        ModelSpec.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="has no revision 'main'"):
        ModelSpec.from_checkpoint(tmp_path, revision="main")
    with pytest.raises(InputError, match="task should be one of"):
        ModelSpec.from_checkpoint(tmp_path, task="chat")  # ty: ignore[invalid-argument-type]


class TestHub:
    """Hub ids, through a cache in the hub's own layout, offline."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture
    def cached(self, checkpoints, tmp_path, monkeypatch):
        """Files are symbolic links into blobs, as huggingface_hub keeps them."""
        from huggingface_hub import constants

        repo = tmp_path / "hub" / "models--Qwen--Qwen3-Embedding-0.6B"
        snapshot = repo / "snapshots" / self.COMMIT
        source = checkpoints()
        (repo / "blobs").mkdir(parents=True)
        for path in source.rglob("*"):
            if path.is_file():
                blob = repo / "blobs" / path.relative_to(source).as_posix().replace("/", "-")
                blob.write_bytes(path.read_bytes())
                link = snapshot / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(self.COMMIT)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def test_from_the_cache(self, cached):
        source = fetch("Qwen/Qwen3-Embedding-0.6B")
        assert source.revision == self.COMMIT
        spec = ModelSpec.from_checkpoint("Qwen/Qwen3-Embedding-0.6B", revision="main")
        assert spec.task == "embedding"
        assert spec.source.id == "Qwen/Qwen3-Embedding-0.6B"

    def test_an_artifact_is_fetched_whole(self, checkpoints, tmp_path, monkeypatch):
        """And the cache is not written to."""
        import huggingface_hub

        artifact = embedport.export(checkpoints(), tmp_path / "snapshots" / self.COMMIT)
        asked = []

        def download(repo_id, revision, allow_patterns):
            asked.append((revision, allow_patterns))
            return str(artifact.folder)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        before = (artifact.folder / "embedport.json").read_bytes()
        embedder = embedport.load("me/qwen3-fp32", device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        assert [revision for revision, _ in asked] == [None, self.COMMIT]
        assert set(artifact.manifest.files) <= set(asked[1][1])
        assert not any(name.startswith("onnx") for name in asked[0][1])
        embedder.calibrate(["one", "two"])
        assert embedder.ranges is not None
        assert (artifact.folder / "embedport.json").read_bytes() == before

    @pytest.mark.parametrize("name", ["out/qwen3--int8", "Qwen/Qwen3-Embedding-0.6B.git"])
    def test_not_a_name(self, name):
        with pytest.raises(InputError, match="no such folder, and not a hub id"):
            fetch(name)

    def test_not_in_the_cache(self, cached):
        with pytest.raises(CheckpointError, match=r"not complete in the hub's cache.*offline mode"):
            ModelSpec.from_checkpoint("Qwen/Qwen3-Embedding-4B")

    def test_a_library_s_own_error(self, monkeypatch):
        import huggingface_hub

        class ProxyError(Exception):
            pass

        def download(*args, **options):
            raise ProxyError("407 Proxy Authentication Required")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
        with pytest.raises(CheckpointError, match="could not be downloaded: ProxyError: 407"):
            fetch("Qwen/Qwen3-Embedding-0.6B")
