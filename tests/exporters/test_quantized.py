"""Quantized graphs: close to fp32, the same in every batch, as small as promised."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import embedport
from embedport.artifact.sizes import graph_sizes
from embedport.attention import SHORT_ROW
from embedport.checkpoint.spec import ModelSpec
from embedport.demo.pipeline import builtin_embedder
from embedport.errors import InputError
from embedport.exporters.calibration.search import _levels
from embedport.exporters.checkpoints import Options as CheckpointOptions
from embedport.exporters.onnx import Options, estimate_onnx
from embedport.quantize.formats import Format, parse_formats, plan_formats
from embedport.quantize.recipe import Recipe
from embedport.runtimes.ort_custom_ops import choose_kernels
from embedport.texts.samples import builtin_pairs, builtin_samples
from embedport.validation import validate
from tests.synthetic import plant_outliers

TEXTS = [sample.text for sample in builtin_samples()] + [""]
PAIRS = [(pair.query, pair.document) for pair in builtin_pairs()]
# Random weights lose more than trained ones: minimum cosine, largest difference of score.
LIMITS = {
    "int8": (0.998, 0.02),
    "int8-weight": (0.998, 0.02),
    "int4": (0.85, 0.2),
}
FP8 = {"precision": "fp8", "dialect": "standard"}


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("precision", LIMITS)
def test_embedding(artifacts, reference, precision, dialect):
    embedder = artifacts("kv8", dialect=dialect, precision=precision)
    vectors = embedder.encode(TEXTS, batch_tokens=2048)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors * reference("kv8", "embedding")).sum(axis=1).min() >= LIMITS[precision][0]


@pytest.mark.parametrize("dialect", ["ort", pytest.param("standard", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", LIMITS)
def test_reranker(artifacts, reference, precision, dialect):
    scores = artifacts("kv8", "reranker", dialect=dialect, precision=precision).score(PAIRS)
    assert np.abs(scores - reference("kv8", "reranker")).max() <= LIMITS[precision][1]


@pytest.mark.parametrize("dialect", ["ort", "standard"])
@pytest.mark.parametrize("precision", LIMITS)
def test_a_text_alone_and_in_a_ragged_batch(artifacts, precision, dialect):
    embedder = artifacts("kv8", dialect=dialect, precision=precision)
    # The standard Attention keeps all scores at once: long texts take seconds.
    texts = TEXTS if dialect == "ort" else [text for text in TEXTS if len(text) < 1000][::4]
    together = embedder.encode(texts, batch_tokens=16_384)
    alone = np.concatenate([embedder.encode([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


def test_short_and_long_rows_in_one_call(artifacts):
    """Their attention is rounded differently, of which 8 bits make more."""
    embedder = artifacts("kv8", precision="int8")
    random = np.random.default_rng(0)
    sizes = (9, SHORT_ROW - 100, SHORT_ROW, SHORT_ROW + 1)
    rows = [random.integers(0, embedder.info.vocab_size, size) for size in sizes]
    alone = np.concatenate([embedder.embed_rows([ids]) for ids in rows])
    together = embedder.embed_rows(rows, batch_tokens=16_384)
    np.testing.assert_allclose(together, alone, atol=1e-5, rtol=0)


def test_smaller_groups_are_closer(artifacts, reference):
    def mean(group_size):
        options = {"precision": "int4", "group_size": group_size, "embedding_bits": 8}
        vectors = artifacts("kv8", **options).encode(TEXTS)
        return (vectors * reference("kv8", "embedding")).sum(axis=1).mean()

    assert mean(32) > mean(64) > mean(128)


def test_bytes_by_part(artifacts):
    def bits(precision, part):
        artifact = artifacts("kv8", precision=precision).artifact
        return sum(graph_sizes(artifact.graph)[part].values()) * 8

    table = 1024 * 128
    matrices = 2 * 3 * 128 * 256
    assert bits("fp32", "embedding table") == 32 * table
    assert bits("int8", "embedding table") == (8 + 32 / 128) * table
    assert bits("int4", "embedding table") == (4 + 32 / 64 + 4 / 64) * table
    scales = 32 * 2 * (256 + 256 + 128)
    norms = 32 * 2 * 128
    assert bits("int8", "SwiGLU") == 8 * matrices + scales
    assert bits("int4", "SwiGLU") == (4 + 32 / 64 + 4 / 64) * matrices
    assert bits("int4", "norms") == bits("fp32", "norms") > norms


@pytest.fixture
def outliers(checkpoints, copied):
    """Channels and tokens whose activations are thousands of times the median."""
    folder = copied(checkpoints("kv8"))
    plant_outliers(folder)
    return folder


def worst(vectors, expected):
    return np.nan_to_num((vectors * expected).sum(axis=1), nan=-1).min()


def test_outliers_do_not_ruin_int8(outliers, tmp_path):
    """onnxruntime's own dynamic int8 has one scale for all tokens of a batch, ours one each."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    def exported(**options):
        folder = tmp_path / "-".join(map(str, options.values()))
        return embedport.load(embedport.export(outliers, folder, **options).folder)

    fp32 = exported(precision="fp32")
    expected = fp32.encode(TEXTS)
    assert worst(exported(precision="int8").encode(TEXTS), expected) >= 0.99
    quantize_dynamic(fp32.artifact.graph, tmp_path / "usual.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "usual.onnx")
    fp32.model = lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
    assert worst(fp32.encode(TEXTS), expected) < 0.5


def test_a_recipe_is_replayed_to_the_byte(artifacts, checkpoints, tmp_path):
    first = artifacts("kv8", precision="int4", group_size=32).artifact
    again = embedport.export(
        checkpoints("kv8"), tmp_path / "again", recipe=first.folder / "embedport.json"
    )
    data = [each.graph.with_name("model.onnx_data").read_bytes() for each in (first, again)]
    assert data[0] == data[1]
    assert again.manifest.precision == "mixed"
    assert again.manifest.recipe == first.manifest.recipe


def test_auto_is_the_smallest_that_keeps_the_cosine(checkpoints, artifacts, tmp_path):
    artifact = embedport.export(
        checkpoints("kv8"), tmp_path / "auto", precision="auto", min_cosine=0.995, fast=True
    )
    recipe = artifact.manifest.recipe
    assert recipe is not None
    search = recipe["search"]
    kept = [trial for trial in search["trials"] if trial["min_cosine"] >= 0.995]
    given_up = [trial for trial in search["trials"] if trial["min_cosine"] < 0.995]
    assert kept
    assert given_up
    smallest = min(kept, key=lambda trial: trial["bytes"])
    assert smallest["bytes"] > max(trial["bytes"] for trial in given_up)
    formats = recipe["formats"]
    assert len(formats) == sum(smallest["counts"].values()) - smallest["counts"].get("fp32", 0)
    data = artifact.graph.with_name("model.onnx_data").stat().st_size
    assert abs(data - smallest["bytes"]) < 4096
    rows = [text for text in TEXTS if 0 < len(text) < 400]
    embedder = embedport.load(artifact.folder)
    assert isinstance(embedder, embedport.Embedder)
    vectors = embedder.encode(rows)
    # Other texts than the search's, just above the target by the kernels' arithmetic.
    apart = 1e-4 if choose_kernels()[0] is None else 0
    assert (vectors * artifacts("kv8").encode(rows)).sum(axis=1).min() >= 0.995 - apart
    measured = {each["name"] for each in search["sensitivities"]}
    assert {"embed_tokens", "layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"} <= measured


def test_auto_within_a_size(checkpoints, artifacts, tmp_path):
    """More bits for the matrices that matter most, by an algorithm that runs texts."""
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text in TEXTS if 0 < len(text) < 200))
    sizes, worst_cosines = [], []
    for bits in (5, 7):
        artifact = embedport.export(
            checkpoints("kv8"),
            tmp_path / str(bits),
            precision="auto",
            average_bits=bits,
            calibration=texts,
        )
        recipe = artifact.manifest.recipe
        assert recipe is not None
        assert (recipe["algorithm"], recipe["rotate_heads"]) == ("awq+gptq", True)
        search = recipe["search"]
        assert search["trials"] == []
        data = artifact.graph.with_name("model.onnx_data").stat().st_size
        assert abs(data - search["bytes"]) < 4096
        fp32 = artifacts("kv8").artifact.graph.with_name("model.onnx_data").stat().st_size
        # Within the size, and less than one matrix below it.
        assert 0 <= bits / 32 * fp32 - search["bytes"] < 256 * 128
        sizes.append(data)
        vectors = embedport.load_embedder(artifact.folder).encode(TEXTS)
        worst_cosines.append(worst(vectors, artifacts("kv8").encode(TEXTS)))
        eight = {name for name, text in recipe["formats"].items() if text == "int8/128s"}
        errors = {each["name"]: each["error"] / each["bytes"] for each in search["sensitivities"]}
        assert min(errors[name] for name in eight) > np.median(list(errors.values())) / 4
    assert worst_cosines[1] > worst_cosines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8", "group_size": 32}, "`group_size` goes with int8-weight and int4"),
        ({"precision": "int4", "group_size": 48}, "group_size should be one of"),
        ({"precision": "int4", "embedding_bits": 3}, "embedding_bits should be 4 or 8"),
        ({"precision": "int4", "algorithm": "best"}, "algorithm should be one of rtn, mse"),
        ({"precision": "fp16", "rotate": True}, "takes none of `algorithm`, `rotate`"),
        ({"precision": "fp32", "min_cosine": 0.9}, "`min_cosine` goes with `precision` auto"),
        ({"precision": "auto", "dialect": "standard"}, "`dialect` ort"),
        ({"precision": "int8", "fast": True}, "int8 is fast: `fast` goes with int4"),
        ({"precision": "int4", "max_bytes": 9}, "`max_bytes` goes with `precision` auto"),
        ({"precision": "auto", "max_bytes": 9, "average_bits": 4}, "say the same"),
        ({"precision": "auto", "average_bits": float("nan")}, "average_bits should be above 0"),
        ({"precision": "auto", "min_cosine": "1"}, "min_cosine should be above 0 .*, found '1'"),
        ({"precision": "int4", "group_size": 32.0}, "group_size should be an integer, found 32.0"),
        ({"precision": "auto", "max_bytes": 9}, "the smallest choice takes .* is 9; allow more"),
        ({"precision": "auto", "average_bits": 0.5}, r"`average_bits` 0\.5 is 1?.*; allow more"),
        ({"precision": "auto", "group_size": 32}, "'auto' takes none of `group_size`, `embed"),
        ({"precision": "bf16", "group_size": 0}, "takes none of `algorithm`, `rotate`"),
        ({"embedding_bits": 0}, "takes none of `algorithm`, `rotate`"),
        ({"recipe": "recipe.json", "embedding_bits": 0}, "a recipe decides everything"),
        ({"precision": "int4", "arithmetic": ""}, "arithmetic should be fp32 or bf16"),
        ({"precision": "int4", "algorithm": ""}, "algorithm should be one of rtn, mse"),
        ({"precision": "auto", "algorithm": ""}, "algorithm should be one of rtn, mse"),
        ({"precision": "fp16", "calibration": ""}, "cannot be read"),
        ({"precision": "mixed"}, "comes from a recipe or `precision` auto"),
        ({"precision": "int8", "calibration": "my.txt"}, "runs no texts: `calibration` goes with"),
        ({"calibration": "my.txt"}, "this export in fp32 runs no texts"),
        ({"device": "cuda"}, "this export in fp32 rounds without texts"),
        ({"precision": "int4", "fast": True, "device": "cuda"}, "`device` goes with `precision`"),
        (
            {"precision": "int8", "dialect": "standard", "embedding_bits": 8},
            "standard dialect keeps its table",
        ),
        ({"recipe": "nowhere.json"}, r"nowhere\.json is not a recipe"),
        ({"precision": "auto", "min_cosine": 1.1}, "min_cosine should be above 0 and at most 1"),
        ({"max_ndcg_loss": 0.1, "retrieval": "builtin"}, "`max_ndcg_loss` goes with `precision`"),
        ({"precision": "auto", "max_ndcg_loss": 0.1}, "`retrieval` go together"),
        *(
            (
                {"precision": "auto", "max_ndcg_loss": loss, "retrieval": "nowhere"},
                f"max_ndcg_loss should be from 0 to 1, found {loss}",
            )
            for loss in (-1, float("nan"))
        ),
        ({"precision": "fp8"}, "fp8 is for engines such as TensorRT: it goes with"),
        (FP8 | {"algorithm": "gptq"}, "fp8 is rounded to nearest: it takes no `algorithm`"),
        (FP8 | {"group_size": 64}, "fp8 has one scale an output channel"),
        ({"precision": "bf16", "arithmetic": "bf16"}, r"takes none of .* and `arithmetic`"),
        ({"precision": "int4", "arithmetic": "fp16"}, "fp32 or bf16, found 'fp16'"),
        ({"precision": "int8", "arithmetic": "bf16"}, "int8 activations on CPUs only"),
    ],
)
def test_options_that_do_not_go_together(checkpoints, tmp_path, monkeypatch, options, message):
    """That is known before a hub's weights are fetched, and in a dry run."""
    monkeypatch.setattr("embedport.exporters.onnx.export.fetch_weights", None)
    with pytest.raises(InputError, match=message):
        embedport.export(checkpoints("kv8"), tmp_path / "out", **options)
    with pytest.raises(InputError, match=message):
        estimate_onnx(checkpoints("kv8"), tmp_path / "out", Options(**options))
    assert not list(tmp_path.iterdir())


def test_numpys_numbers_become_pythons():
    """JSON, which a manifest is, has no others."""
    numbers: dict[str, Any] = {"max_length": np.int64(9), "min_cosine": np.float32(0.5)}
    options = Options("auto", **numbers)
    assert json.dumps([options.max_length, options.min_cosine]) == "[9, 0.5]"
    numbers = {"bits": np.int64(4), "group_size": np.uint8(32)}
    stored = CheckpointOptions("gptq", **numbers)
    assert json.dumps([stored.bits, stored.group_size]) == "[4, 32]"


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int8"},  # rotated
        {"precision": "auto", "max_bytes": 1 << 40},  # no more than fp32
        {"precision": "int8", "dialect": "standard", "consumers": ["openvino"]},
    ],
)
def test_a_dry_run_knows_the_bytes(checkpoints, tmp_path, options):
    estimate = estimate_onnx(checkpoints("kv8"), tmp_path / "out", Options(**options))
    assert not list(tmp_path.iterdir())
    embedport.export(checkpoints("kv8"), tmp_path / "out", **options)
    data = [*tmp_path.rglob("*.onnx_data"), *tmp_path.rglob("*.bin")]
    assert estimate.bytes == pytest.approx(sum(each.stat().st_size for each in data), rel=0.01)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{", "is not a recipe"),
        ("[]", "should hold"),
        ({"formats": {"layers.9.mlp.up_proj": "int8"}}, "not a matrix of"),
        ({"formats": {"layers.0.mlp.up_proj": "int5"}}, "a format should be like"),
        ({"formats": {"layers.0.mlp.up_proj": "int4"}}, "a format should be like"),
        ({"formats": {"layers.0.mlp.up_proj": 8}}, "a format should be text"),
        ({"formats": {"layers.0.mlp.up_proj": "int4/48"}}, "group should be one of"),
        ({"formats": {"embed_tokens": "int8"}}, "not a format of a table"),
        ({"formats": {"layers.0.mlp.up_proj": "fp8"}}, "fp8 goes with `dialect` standard"),
        ({"formats": {}, "rotate": True, "rotate_heads": True}, "rotate turns heads too"),
        ({"formats": {}, "rotate": "no"}, "rotate should be bool, found 'no'"),
        ({"formats": {}, "bits": 4}, "'bits' is not part of a recipe"),
        ({"formats": {}, "algorithm": ["rtn"]}, "algorithm should be one of rtn, mse"),
        ({"formats": {}, "seed": -1}, "seed should be 0 or more, found -1"),
        (
            {"formats": {}, "algorithm": "stored", "rotate": True},
            "should be false, found True, False and F",
        ),
        ({"formats": {}, "algorithm": "stored", "balance": True}, "found False, False and True"),
        ({"formats": {}, "calibration": "my.txt"}, "calibration should be null or an artifact's"),
    ],
)
def test_bad_recipes(checkpoints, tmp_path, recipe, message):
    path = tmp_path / "recipe.json"
    path.write_text(recipe if isinstance(recipe, str) else json.dumps(recipe))
    with pytest.raises(InputError, match=message):
        embedport.export(checkpoints("kv8"), tmp_path / "out", recipe=path)
    assert not (tmp_path / "out").exists()


def test_older_recipes_name_the_range_search_hqq(tmp_path):
    path = tmp_path / "embedport.json"
    recipe = {"formats": {"embed_tokens": "int4/64"}, "algorithm": "hqq", "search": None}
    path.write_text(json.dumps({"format_version": 1, "recipe": recipe}))
    assert Recipe.from_file(path).algorithm == "mse"


def test_a_standard_table_has_whole_groups(checkpoints, tmp_path):
    """At a width of 96, groups of 64 would be read as groups of 48."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"formats": {"embed_tokens": "int8/64s"}}))
    with pytest.raises(InputError, match="groups of 64 should divide the width, 96"):
        embedport.export(checkpoints("kv1"), tmp_path / "out", recipe=path, dialect="standard")
    path.write_text(json.dumps({"formats": {"embed_tokens": "int8/32"}}))
    with pytest.raises(InputError, match=r"int8/32 has zero points, .* use int8/32s or"):
        embedport.export(checkpoints("kv1"), tmp_path / "out", recipe=path, dialect="standard")


def test_a_table_of_an_odd_width_has_8_bits(checkpoints):
    """onnxruntime takes no row that ends within a byte: it is refused up front."""
    spec = replace(ModelSpec.from_checkpoint(checkpoints()), hidden_size=65)
    message = r"embed_tokens: int4/\d+ holds .* hidden_size is odd, 65: use `embedding_bits` 8"
    with pytest.raises(InputError, match=message):
        plan_formats(spec, "int4", dialect="ort", fast=True)
    with pytest.raises(InputError, match=message):
        parse_formats(spec, {"embed_tokens": "int4/32"}, "ort")
    assert plan_formats(spec, "int4", dialect="ort")["embed_tokens"].scheme.bits == 8
    assert _levels(spec, "embed_tokens") == ["int8/128s", "fp32"]


@pytest.mark.parametrize(("geometry", "size"), [("kv8", 128), ("blocks", 64)])
def test_engines_take_whole_groups(checkpoints, geometry, size):
    """At a width of 192, the second of two groups of 128 would be half one."""
    spec = ModelSpec.from_checkpoint(checkpoints(geometry))
    formats = plan_formats(spec, "int4", dialect="standard")
    assert {str(format) for format in formats.values()} == {f"int4/{size}s"}


def test_a_standard_table_gives_the_same(checkpoints, artifacts, tmp_path):
    """As a recipe of the other dialect does. At a width of 96 a row has three groups of 32."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"formats": {"embed_tokens": "int8/32s"}}))
    ort, standard = (
        embedport.load_embedder(
            embedport.export(
                checkpoints("kv1"), tmp_path / dialect, recipe=path, dialect=dialect
            ).folder
        ).encode(TEXTS[::4])
        for dialect in ("ort", "standard")
    )
    np.testing.assert_allclose(standard, ort, atol=1e-6, rtol=0)
    assert np.abs(ort - artifacts("kv1").encode(TEXTS[::4])).max() > 1e-5


def test_a_folder_that_is_here_is_not_replaced(checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="exists; choose another place"):
        embedport.export(checkpoints("kv8"), ".", precision="int4", algorithm="gptq")


@pytest.mark.parametrize("text", ["int8", "int8/128s", "int8/32", "int4/64", "int4/32s"])
def test_a_format_is_its_text(text):
    assert str(Format.parse(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("limits", [(0.02,), (0.001, 0.02)])
def test_auto_keeps_retrieval_quality(small_set, tmp_path, limits):
    data = small_set(every=80, others=30)
    checkpoint = builtin_embedder()
    found = {}
    for limit in limits:
        artifact = embedport.export(
            checkpoint,
            tmp_path / str(limit),
            precision="auto",
            fast=True,
            max_ndcg_loss=limit,
            retrieval=data,
        )
        recipe = artifact.manifest.recipe
        assert recipe is not None
        search = recipe["search"]
        assert (search["min_cosine"], search["max_ndcg_loss"]) == (None, limit)
        kept = [trial for trial in search["trials"] if trial["ndcg_loss"] <= limit]
        found[limit] = min(trial["bytes"] for trial in kept)
        report = validate(
            artifact.folder, checkpoint, ["a text"], retrieval=data, max_ndcg_loss=limit
        )
        assert report.retrieval is not None
        assert report.retrieval.ndcg_loss is not None
        assert report.retrieval.ndcg_loss <= limit + 1e-3
    assert len(limits) == 1 or found[0.02] < found[0.001]
