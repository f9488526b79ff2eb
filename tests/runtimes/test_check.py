"""An artifact's vectors here, compared with those it gave where it was exported."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import embedport
from embedport.artifact.folder import Artifact, write_manifest
from embedport.artifact.manifest import Manifest
from embedport.artifact.witness import WITNESS, read_witness, write_witness
from embedport.errors import ArtifactError, InputError, VerificationError
from embedport.runtimes import Reranker, comparison
from embedport.runtimes.ort_custom_ops import VARIABLE
from tests.synthetic import edit

WITNESSES = True

CASES = [
    ("embedding", {}),
    ("embedding", {"precision": "int8"}),
    pytest.param("embedding", {"precision": "int8-weight"}, marks=pytest.mark.slow),
    ("embedding", {"precision": "int4"}),
    pytest.param("embedding", {"precision": "fp16"}, marks=pytest.mark.slow),
    ("embedding", {"precision": "bf16"}),
    pytest.param("embedding", {"precision": "fp8", "dialect": "standard"}, marks=pytest.mark.slow),
    ("embedding", {"precision": "int8", "dialect": "standard"}),
    pytest.param("embedding", {"dialect": "standard"}, marks=pytest.mark.slow),
    ("embedding", {"dim": 32}),
    ("embedding", {"outputs": "hidden"}),
    pytest.param("embedding", {"max_length": 8}, marks=pytest.mark.slow),
    ("reranker", {}),
    ("reranker", {"precision": "int8"}),
    pytest.param("reranker", {"precision": "int4"}, marks=pytest.mark.slow),
    pytest.param("reranker", {"precision": "bf16", "dialect": "standard"}, marks=pytest.mark.slow),
]


@pytest.fixture
def made(exported):
    """A function (task, **options of export) -> the artifact's folder, cached."""
    return lambda task="embedding", **options: exported("blocks", task, **options).folder


def rewrite(folder):
    """Refresh a manifest, as somebody would who changed a file on purpose."""
    manifest = Manifest.from_json(folder / "embedport.json")
    write_manifest(folder, replace(manifest, files={}), folder.name)


@pytest.mark.parametrize(("task", "options"), CASES)
def test_the_witness_is_what_load_gives(made, task, options):
    """To the bit, though the exporter ran the graph part by part."""
    folder = made(task, **options)
    loaded = embedport.load(folder, device="cpu")
    witness = read_witness(folder / WITNESS)
    assert WITNESS in Artifact.open(folder).manifest.files
    assert len(witness.rows) == 16
    if isinstance(loaded, Reranker):
        assert witness.queries is not None
        found = loaded.score_rows(witness.rows, witness.queries)
    else:
        found = loaded.embed_rows(witness.rows)
        assert found.shape == (16, loaded.dim)
        # A reranker's rows share their beginnings here, and not in the export.
        np.testing.assert_array_equal(found, witness.results)
    np.testing.assert_allclose(found, witness.results, rtol=0, atol=1e-6)
    checked = embedport.check(folder, device="cpu")
    assert checked.passed
    assert checked.reasons == []
    assert checked.exported == checked.here
    assert checked.verdict.startswith(f"the same {checked.noun} as on {checked.here.cpu}")


def test_rows_are_short_and_long(made):
    lengths = [len(ids) for ids in read_witness(made() / WITNESS).rows]
    assert min(lengths) < 16
    assert max(lengths) == 144
    assert sum(length > 128 for length in lengths) >= 2
    pairs = read_witness(made("reranker") / WITNESS)
    assert pairs.queries is not None
    assert sorted(pairs.queries) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4


def test_kernels_on_one_side_only(made, monkeypatch, caplog):
    """int8 is held to less where other code rounds, and the result says why."""
    folder = made(precision="int8")
    exported = read_witness(folder / WITNESS).machine
    monkeypatch.setenv(VARIABLE, "none")
    found = embedport.check(folder, device="cpu")
    assert found.passed
    assert found.here.kernels is None
    if exported.kernels is None:
        pytest.skip("the package was built without kernels")
    assert found.limit == comparison.UNLIKE["int8"].min_cosine
    assert "kernels ran only where it was exported" in found.reasons[0]
    assert "wider limit" in found.reasons[1]
    embedport.load(folder, device="cpu", check=True)
    (warning,) = [text for text in caplog.messages if "wider limit" in text]
    assert warning.startswith(f"{folder}: the same vectors as on ")
    # fp32 differs by the order of sums alone.
    assert embedport.check(made(), device="cpu").limit == comparison.ON_CPUS["fp32"].min_cosine


def test_limits_by_machine(made):
    """The narrow ones where the same code rounds: the kernels, or one onnxruntime's on one CPU."""
    manifest = Artifact.open(made(precision="int8")).manifest
    assert manifest.recipe is not None
    # A table is looked up, not multiplied.
    formats = manifest.recipe["formats"] | {"embed_tokens": "int4/64"}
    manifest = replace(manifest, recipe={**manifest.recipe, "formats": formats})
    kernels = replace(
        read_witness(made() / WITNESS).machine, kernels="avx2", instructions=("avx2",)
    )
    plain = replace(kernels, kernels=None)
    unknown = replace(plain, instructions=())
    for exported, here, narrow in (
        (kernels, replace(kernels, kernels="neon", onnxruntime="9", instructions=("neon",)), True),
        (kernels, plain, False),
        (plain, kernels, False),
        (plain, plain, True),
        (plain, replace(plain, cpu="another"), True),
        (plain, replace(plain, instructions=("avx512f",)), False),
        (plain, replace(plain, onnxruntime="9"), False),
        (unknown, unknown, True),
        (unknown, replace(unknown, cpu="another"), False),
    ):
        expected = comparison.ON_CPUS if narrow else comparison.UNLIKE
        assert comparison.find_limits(manifest, "cpu", exported, here) == expected["int8"]
        found = comparison.find_limits(manifest, "cuda", exported, here)
        assert found == comparison.ON_GPUS["int8"]


def test_tampered_scales_are_found(made, copied):
    """The manifest's hashes are right again, and the vectors are not."""
    folder = copied(made(precision="int8"))
    path = folder / "onnx/model.onnx"
    model = onnx.load(path)
    tensor = next(
        each
        for each in model.graph.initializer
        if each.data_type == onnx.TensorProto.FLOAT and "down_proj" in each.name
    )
    scales = numpy_helper.to_array(tensor).copy()
    scales.ravel()[: scales.size // 2] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(scales, tensor.name))
    onnx.save(
        model, path, save_as_external_data=True, location="model.onnx_data", size_threshold=1024
    )
    rewrite(folder)
    found = embedport.check(folder, device="cpu")
    assert not found.passed
    assert found.min_cosine is not None
    assert found.min_cosine < found.limit
    assert found.reasons == []
    with pytest.raises(
        VerificationError, match=r"not the same vectors as on .* files were changed"
    ):
        embedport.load(folder, device="cpu", check=True)
    embedport.load(folder, device="cpu")


def saturating(a, b):
    """uint8 [n, k] by int8 [k, m], two products at a time in 16 bits, as CPUs without VNNI."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    k = a.shape[1] // 2 * 2
    pairs = a[:, :k:2, None] * b[None, :k:2] + a[:, 1:k:2, None] * b[None, 1:k:2]
    return np.clip(pairs, -32768, 32767).sum(1) + a[:, k:] @ b[k:]


def test_a_saturating_product_would_be_found():
    """The measured error of a saturating product is far beyond the wider of int8's limits."""
    generator = np.random.default_rng(0)
    a = generator.normal(128, 40, (16, 512)).clip(0, 255).astype(np.uint8)
    b = generator.normal(0, 60, (512, 256)).clip(-127, 127).astype(np.int8)
    # The zero point's part is taken away as onnxruntime does, exactly.
    zero = 128 * b.astype(np.int64).sum(0)
    exact = a.astype(np.int64) @ b.astype(np.int64) - zero
    cosines = comparison.cosines(saturating(a, b) - zero, exact)
    assert cosines.min() < comparison.UNLIKE["int8"].min_cosine


def test_an_older_artifact_on_a_cpu_without_vnni(made, copied):
    """Where one of two CPUs has VNNI, the result says that int8 may saturate on the other."""
    folder = copied(made(precision="int8"))
    witness = read_witness(folder / WITNESS)
    vnni = {"avx_vnni", "avx512_vnni", "amx_int8"}
    # "sse4_2" is a CPU that saturates, and "neon" one that does not.
    here = set(witness.machine.instructions)
    other = ("neon",) if "sse4_2" in here and not here & vnni else ("sse4_2", "avx2", "fma")
    machine = replace(
        witness.machine, cpu="another", instructions=other, onnxruntime="1.27.0", embedport="0.0.1"
    )
    results = np.roll(witness.results, 1, axis=0)
    write_witness(folder / WITNESS, replace(witness, machine=machine, results=results))
    rewrite(folder)
    found = embedport.check(folder, device="cpu")
    text = "\n".join(found.reasons)
    assert not found.passed
    for words in ("another kind of CPU", "onnxruntime: 1.27.0", "embedport: 0.0.1", "saturate"):
        assert words in text


def test_a_score_that_differs(made, copied):
    folder = copied(made("reranker"))
    witness = read_witness(folder / WITNESS)
    results = witness.results.copy()
    results[5] += 1e-3
    write_witness(folder / WITNESS, replace(witness, results=results))
    rewrite(folder)
    found = embedport.check(folder, device="cpu")
    assert (found.passed, found.worst, found.min_cosine) == (False, 5, None)
    assert found.max_difference == pytest.approx(1e-3, rel=1e-3)


def test_nan_does_not_pass(made, copied):
    folder = copied(made())
    witness = read_witness(folder / WITNESS)
    witness.results[3, 0] = np.nan
    write_witness(folder / WITNESS, witness)
    rewrite(folder)
    found = embedport.check(folder, device="cpu")
    assert (found.passed, found.worst) == (False, 3)


def test_a_length_that_differs(made, copied):
    """A cosine does not show it."""
    folder = copied(made())
    witness = read_witness(folder / WITNESS)
    results = witness.results.copy()
    results[5] *= 1.0005  # vectors of this cosine may be 0.00045 apart
    write_witness(folder / WITNESS, replace(witness, results=results))
    rewrite(folder)
    found = embedport.check(folder, device="cpu")
    assert not found.passed
    assert found.min_cosine == pytest.approx(1, abs=1e-12)
    assert found.max_stretch == pytest.approx(5e-4, rel=1e-2)
    assert "(limit 0.9999999)" in found.figures


@pytest.mark.parametrize(("token", "found"), [(1024, r"\d+ to 1024"), (-1, r"-1 to \d+")])
def test_another_models_tokens(made, copied, token, found):
    """A graph takes -1 for the table's last row."""
    folder = copied(made())
    witness = read_witness(folder / WITNESS)
    witness.rows[3][0] = token
    write_witness(folder / WITNESS, witness)
    rewrite(folder)
    with pytest.raises(ArtifactError, match=f"token ids should be from 0 to 1023, found {found}"):
        embedport.check(folder, device="cpu")


def test_prompts_that_are_not_pooled(checkpoints, copied, tmp_path):
    """The graph takes their length: a witness's rows have none."""
    folder = copied(checkpoints("blocks"))
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    artifact = embedport.export(folder, tmp_path / "out")
    graph = artifact.manifest.graph
    assert graph is not None
    assert "prompt_length" in graph.inputs
    assert embedport.check(artifact.folder, device="cpu").passed


def test_another_models_witness(made, copied):
    """The witness has another width, or is an embedder's in a reranker's folder."""
    witness = read_witness(made() / WITNESS)
    for task, other, message in (
        ("embedding", replace(witness, results=witness.results[:, 1:]), r"shape \(16, 63\), and"),
        ("reranker", witness, "is an embedder's, and the artifact is a reranker"),
    ):
        folder = copied(made(task), task)
        write_witness(folder / WITNESS, other)
        rewrite(folder)
        with pytest.raises(ArtifactError, match=message):
            embedport.check(folder, device="cpu")


def test_without_a_witness(made, copied, checkpoints):
    folder = copied(made())
    (folder / WITNESS).unlink()
    with pytest.raises(ArtifactError, match=r"witness\.safetensors is missing"):
        embedport.check(folder)
    rewrite(folder)
    with pytest.raises(ArtifactError, match="export it again"):
        embedport.check(folder)
    with pytest.raises(ArtifactError, match="export it again"):
        embedport.load(folder, check=True)
    with pytest.raises(InputError, match="is a checkpoint"):
        embedport.load(checkpoints("blocks"), device="cpu", check=True)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\x00" * 40,
        lambda witness: replace(witness, results=witness.results[:5]),
        lambda witness: replace(witness, queries=[[i] for i in range(16)]),
        lambda witness: replace(witness, machine=replace(witness.machine, cpu=None)),
        lambda witness: replace(witness, machine=replace(witness.machine, instructions=[7])),
    ],
)
def test_a_damaged_witness(made, copied, damage):
    folder = copied(made())
    if callable(damage):
        write_witness(folder / WITNESS, damage(read_witness(folder / WITNESS)))
    else:
        (folder / WITNESS).write_bytes(damage)
    rewrite(folder)
    with pytest.raises(ArtifactError, match="is not a witness"):
        embedport.check(folder)


def test_nothing_imports_torch(made):
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import embedport; print(embedport.check(sys.argv[1], device='cpu').passed)\n"
        "print('onnx' in sys.modules, 'onnx_ir' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(made())]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "True\nFalse False\n"


def test_mixed_takes_the_loosest(made, tmp_path, checkpoints):
    manifest = Artifact.open(made(precision="int8")).manifest
    machine = read_witness(made(precision="int8") / WITNESS).machine
    assert manifest.recipe is not None
    formats = dict(manifest.recipe["formats"])
    first = next(name for name in formats if name != "embed_tokens")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps({"formats": formats | {first: "int4/64"}}))
    folder = embedport.export(checkpoints("blocks"), tmp_path / "mixed", recipe=recipe).folder
    mixed = Artifact.open(folder).manifest
    limits = comparison.find_limits(mixed, "cpu", machine, machine)
    assert limits == comparison.ON_CPUS["int4"] != comparison.ON_CPUS["int8"]
    assert embedport.check(folder, device="cpu").passed


def test_an_engine_is_made_of_an_older_artifact(made, copied, tmp_path, monkeypatch):
    """`export tensorrt` keeps the witness of a graph, and makes one where there is none."""
    folder = copied(made(dialect="standard"))
    (folder / WITNESS).unlink()
    rewrite(folder)
    from embedport.exporters.tensorrt import export_tensorrt

    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)  # the engine itself is no matter here
    artifact = export_tensorrt(folder, tmp_path / "engine")
    assert embedport.check(artifact.folder, device="cpu").passed
    shutil.rmtree(artifact.folder)
