"""The files written with an engine and without, and what is asked for that cannot be."""

import runpy
import shutil
import subprocess
import sys
from collections import namedtuple

import numpy as np
import pytest

import embedport
from embedport.artifact.manifest import Manifest
from embedport.errors import DeviceError, InputError
from embedport.exporters.tensorrt import obstacle
from embedport.exporters.tensorrt.export import _choose_library
from embedport.exporters.tensorrt.options import EngineOptions, Target
from embedport.machine.engine import Profile
from embedport.runtimes import read_info
from tests.synthetic import edit

PROFILES = ["1x1:2x8:4x64", "2x16:8x64:16x128"]
# RTX calls timing caches deprecated.
TIMINGS = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def test_the_folder(graphs, engines, rtx):
    artifact = engines()
    manifest = artifact.manifest
    assert {"engine/model.plan", "engine/build.sh", "engine/check.py", "engine/check.npz"} <= set(
        manifest.files
    )
    assert set(graphs().manifest.files) <= set(manifest.files)
    assert (manifest.format, manifest.precision) == ("tensorrt", "fp32")
    assert manifest.requires == f"tensorrt-rtx=={rtx.__version__}"
    assert manifest.versions["tensorrt-rtx"] == rtx.__version__
    # The engine takes what its largest profile does; another one may be built from the same graph.
    assert manifest.max_length == graphs().manifest.max_length
    assert read_info(artifact.folder).max_length == 128
    assert Manifest.from_json(artifact.folder / "embedport.json") == manifest
    card = (artifact.folder / "README.md").read_text()
    assert "A TensorRT engine of a Qwen3 embedding model" in card
    assert f"| Engine | `engine/model.plan`, TensorRT for RTX {rtx.__version__} |" in card
    assert "| GPU | GPUs of compute capability 8.0, 8.6, 8.9, 12.0, 12.1 |" in card
    assert "| Products | 14 in fp32 |" in card


def test_default_profiles_are_no_longer_than_the_model(graphs, without, copied, tmp_path):
    folder = copied(graphs().folder)
    path = folder / "embedport.json"
    path.write_text(path.read_text().replace(": 32768", ": 256"))
    embedport.export_tensorrt(folder, tmp_path / "out")
    script = (tmp_path / "out" / "engine" / "build.sh").read_text()
    assert "--maxShapes=input_ids:8x256,attention_mask:8x256" in script
    assert "--maxShapes=input_ids:256x256,attention_mask:256x256" in script


def test_no_room_for_the_engine(checkpoints, rtx, tmp_path, monkeypatch):
    """How large a checkpoint's graph is, and so its engine, is known when it is written."""
    usage = namedtuple("usage", "total used free")

    def disk_usage(path):
        written = any(tmp_path.rglob("model.onnx_data"))
        return usage(10**12, 0, 1000 if written else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    with pytest.raises(
        InputError, match=r"1 kB free beside the graph, and its engine needs about \d+ kB"
    ):
        embedport.export_tensorrt(checkpoints("blocks"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_of_this_machine_comes_first(tensorrt, rtx):
    """Where both libraries can build, the other one has to be asked for."""
    tensorrt()
    profiles = (Profile.parse("1x1:1x1:1x1"),)
    for options, library in [
        (EngineOptions(profiles), "tensorrt"),
        (EngineOptions(profiles, target="rtx"), "tensorrt-rtx"),
        (EngineOptions(profiles, capabilities=((8, 9),)), "tensorrt-rtx"),
    ]:
        assert _choose_library(options) == library


@pytest.fixture
def without(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)


class TestWithoutAnEngine:
    """Type stubs of TensorRT are installed here, and TensorRT is not."""

    def test_too_old(self, tensorrt):
        tensorrt("tensorrt", "10.13.0.35")
        assert obstacle("tensorrt") == (
            "TensorRT 10.13.0.35 is too old, RMSNormalization and Attention need 10.15 or later"
        )
        tensorrt("tensorrt-rtx", "1.4.0.76")
        assert "TensorRT for RTX 1.4.0.76 is too old" in str(obstacle("tensorrt-rtx"))

    def test_why(self, cuda, tensorrt, rtx):
        assert obstacle("tensorrt-rtx") is None
        assert "TensorRT is not installed" in str(obstacle("tensorrt"))
        tensorrt()
        assert obstacle("tensorrt") is None
        cuda.device = None
        assert obstacle("tensorrt") == (
            "no GPU can be used here (CUDA: cudaGetDeviceCount failed with cudaErrorNoDevice)"
        )

    @pytest.mark.parametrize(
        "precision",
        [
            "fp16",
            "fp8",
            "int4",
            *(pytest.param(each, marks=pytest.mark.slow) for each in ("bf16", "int8")),
        ],
    )
    def test_what_is_written(self, without, checkpoints, tmp_path, precision):
        artifact = embedport.export_tensorrt(
            checkpoints("blocks"), tmp_path / "out", precision=precision, fast=precision == "int4"
        )
        manifest = artifact.manifest
        assert (manifest.format, manifest.precision) == ("onnx", precision)
        assert manifest.engine is None
        assert manifest.graph is not None
        assert manifest.graph.arithmetic == ("fp16" if precision == "fp16" else "bf16")
        if precision == "int4":
            assert manifest.recipe is not None
            assert manifest.recipe["algorithm"] == "rtn"
        assert "engine/model.plan" not in manifest.files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        embedder = embedport.load(tmp_path / "out")
        with np.load(tmp_path / "out" / "engine" / "check.npz") as file:
            check = dict(file)
        found = embedder.model(check["input_ids"], check["attention_mask"])
        np.testing.assert_allclose(found, check["sentence_embedding"], atol=0.02)

    def test_build_script(self, without, graphs, tmp_path):
        embedport.export_tensorrt(
            graphs().folder,
            tmp_path / "out",
            profiles=PROFILES,
            version_compatible=True,
            hardware_compatible="same-capability",
        )
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "trtexec").write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
        (folder / "trtexec").chmod(0o755)
        script = tmp_path / "out" / "engine" / "build.sh"
        path = {"PATH": f"{folder}:/usr/bin:/bin"}
        ran = subprocess.run([script], env=path, capture_output=True, text=True, check=True)
        words = ran.stdout.split("\n")
        assert (script.parent / words[0].removeprefix("--onnx=")).is_file()
        assert {"--stronglyTyped", "--versionCompatible", "--noTF32"} <= set(words)
        assert "--hardwareCompatibilityLevel=sameComputeCapability" in words
        second = words[words.index("--profile=1") :]
        assert second[:4] == [
            "--profile=1",
            "--minShapes=input_ids:2x16,attention_mask:2x16",
            "--optShapes=input_ids:8x64,attention_mask:8x64",
            "--maxShapes=input_ids:16x128,attention_mask:16x128",
        ]

    @TIMINGS
    @pytest.mark.parametrize(
        "task", ["embedding", pytest.param("reranker", marks=pytest.mark.slow)]
    )
    @pytest.mark.parametrize("spoiled", [False, True])
    def test_check_script(self, engines, rtx, tmp_path, monkeypatch, capfd, task, spoiled):
        """Polygraphy and RTX's builder are real; the engine then runs in onnxruntime."""
        monkeypatch.setenv("POLYGRAPHY_USE_TENSORRT_RTX", "1")
        backend = pytest.importorskip("polygraphy.backend.trt")
        artifact = engines(task)
        model = embedport.load(artifact.folder, device="cpu").model
        output = artifact.manifest.graph.outputs[0]

        class Runner:
            def __init__(self, engine):
                if not spoiled:
                    plan = backend.EngineBytesFromNetwork.call_impl(engine)
                    assert bytes(plan)[:4] == b"vtrt"

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def infer(self, feeds):
                found = model(feeds["input_ids"], feeds["attention_mask"])
                return {output: found[..., ::-1] + 0.1 if spoiled else found}

        monkeypatch.setattr(backend, "TrtRunner", Runner)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(artifact.folder / "engine" / "check.py"))
        assert bool(ended.value.code) == spoiled
        if not spoiled:
            flags = next(line for line in capfd.readouterr().out.splitlines() if "Flags" in line)
            assert "STRONGLY_TYPED" in flags
            assert "TF32" not in flags

    def test_again_without_the_engine(self, engines, without, tmp_path):
        """An artifact with an engine is a source too, and leaves the engine behind."""
        again = embedport.export_tensorrt(engines().folder, tmp_path / "again")
        assert (again.manifest.format, again.manifest.engine) == ("onnx", None)
        assert "engine/model.plan" not in again.manifest.files


def test_bad_requests(artifacts_of_other_dialects, checkpoints, graphs, tmp_path):
    def export(source, **options):
        embedport.export_tensorrt(source, tmp_path / "out", **options)

    with pytest.raises(InputError, match=r"precision should be one of fp16, bf16, .*'fp32'"):
        export(checkpoints("blocks"), precision="fp32")
    with pytest.raises(InputError, match="at least one profile: give `profiles`"):
        export(checkpoints("blocks"), profiles=[])
    with pytest.raises(InputError, match=r"should be one of none, ampere\+, same-capability"):
        export(checkpoints("blocks"), hardware_compatible="all")
    with pytest.raises(InputError, match="for should be one of rtx, this-gpu, found 'cloud'"):
        export(checkpoints("blocks"), target="cloud")
    with pytest.raises(InputError, match=r"capability should be like 8.9 or 12.0; found 'sm89'"):
        export(checkpoints("blocks"), compute_capabilities=["sm89"])
    for options in (
        {"target": "rtx", "version_compatible": True},
        {"target": "this-gpu", "compute_capabilities": ["8.9"]},
        {"compute_capabilities": ["8.9"], "hardware_compatible": "ampere+"},
    ):
        with pytest.raises(InputError, match="`compute_capability` is for engines that TensorRT"):
            export(checkpoints("blocks"), **options)
    with pytest.raises(InputError, match="`fast` is of the precision int4"):
        export(checkpoints("blocks"), precision="int8", fast=True)
    with pytest.raises(InputError, match="is an artifact in fp32: it takes none of `precision`"):
        export(graphs().folder, precision="bf16")
    with pytest.raises(InputError, match="the pooled output in the ort dialect, and TensorRT"):
        export(artifacts_of_other_dialects)
    assert list(tmp_path.iterdir()) == []


def test_prompts_that_are_not_pooled(checkpoints, without, copied, tmp_path):
    """Their length is a further input, and an engine's would not be fed."""
    folder = copied(checkpoints("blocks"))
    edit(folder / "1_Pooling" / "config.json", include_prompt=False)
    graph = embedport.export(folder, tmp_path / "graph", dialect="standard")
    for source in (folder, graph.folder):
        with pytest.raises(InputError, match="the model leaves its prompts out of pooling"):
            embedport.export_tensorrt(source, tmp_path / "out", progress=never)
    assert not (tmp_path / "out").exists()


def test_a_profile_beyond_the_model(checkpoints, tmp_path):
    """It is refused before the graph is written, which takes minutes."""
    with pytest.raises(InputError, match=r"texts of 40,000 tokens, and the model takes 32,768"):
        embedport.export_tensorrt(
            checkpoints("blocks"), tmp_path / "out", profiles=["1x1:1x8:1x40000"], progress=never
        )


def never(stage, done, total):
    """Progress of an export that should not begin."""
    raise AssertionError(stage)


def test_what_was_asked_for_and_cannot_be(graphs, without, tmp_path):
    """Nothing is written without an engine if it was said what it is for."""
    reasons: dict[Target, str] = {
        "rtx": r"`target` rtx: TensorRT for RTX is not installed: pip install 'embedport\[tensorrt",
        "this-gpu": "`target` this-gpu: TensorRT is not installed",
    }
    for target, reason in reasons.items():
        with pytest.raises(DeviceError, match=reason):
            embedport.export_tensorrt(graphs().folder, tmp_path / "out", target=target)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def artifacts_of_other_dialects(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("ort") / "artifact"
    return embedport.export(checkpoints("blocks"), folder, dialect="ort").folder


def test_inspect(engines, rtx, capsys, monkeypatch):
    from embedport.cli import main

    monkeypatch.setattr(sys, "argv", ["embedport", "inspect", str(engines().folder)])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        f"engine/model.plan: TensorRT for RTX {rtx.__version__}; GPUs of compute capability 8.0, "
        "8.6, 8.9, 12.0, 12.1; batches 1x1:2x8:4x64, 8x128:8x128:8x128"
    ) in shown
