"""A build's arguments, and the files written with an engine and without."""

import runpy
import shutil
import subprocess
import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import embedport
from embedport.artifact.manifest import Manifest
from embedport.errors import InputError, VerificationError
from embedport.exporters.tensorrt import build as build_module
from embedport.exporters.tensorrt import obstacle
from embedport.integrity import cache_folder
from embedport.machine.engine import Device
from embedport.runtimes import read_facts

PROFILES = ["1x1:2x8:4x64", "2x16:8x64:16x128"]


@pytest.mark.parametrize(("version", "flags"), [("10.15.1.29", 1 << 1), ("11.1.0.106", 0)])
def test_a_build(build, attention_layers, version, flags):
    artifact, trt = build(version=version, profiles=PROFILES)
    network, config = trt.built.network, trt.built.config
    assert network.flags == flags
    assert [each.attention.decomposable for each in attention_layers(network)] == [True]
    assert config.cleared == [trt.BuilderFlag.TF32]
    assert config.flags == []
    assert config.hardware_compatibility_level == trt.HardwareCompatibilityLevel.NONE
    assert [each.shapes for each in config.profiles] == [
        dict.fromkeys(("input_ids", "attention_mask"), three)
        for three in (((1, 1), (2, 8), (4, 64)), ((2, 16), (8, 64), (16, 128)))
    ]
    engine = artifact.manifest.engine
    assert (engine.device, engine.tensorrt) == (Device("Fake H100", (9, 0)), version)
    assert list(map(str, engine.profiles)) == PROFILES


def test_options(build):
    artifact, trt = build(version_compatible=True, hardware_compatible="same-capability")
    config = trt.built.config
    assert config.flags == [trt.BuilderFlag.VERSION_COMPATIBLE]
    level = trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY
    assert config.hardware_compatibility_level == level
    engine = artifact.manifest.engine
    assert (engine.version_compatible, engine.hardware_compatible) == (True, "same-capability")


def test_the_folder(build, graphs):
    artifact, _ = build(profiles=PROFILES)
    manifest = artifact.manifest
    assert {"engine/model.plan", "engine/build.sh", "engine/check.py", "engine/check.npz"} <= set(
        manifest.files
    )
    assert set(graphs().manifest.files) <= set(manifest.files)
    assert (manifest.format, manifest.precision) == ("tensorrt", "fp32")
    assert manifest.requires == "tensorrt==11.1.0.106"
    # The engine takes what its largest profile does; another one may be built from the same graph.
    assert manifest.max_length == graphs().manifest.max_length
    assert read_facts(artifact.folder).max_length == 128
    assert Manifest.from_json(artifact.folder / "embedport.json") == manifest
    card = (artifact.folder / "README.md").read_text()
    assert "A TensorRT engine of a Qwen3 embedding model" in card
    assert "| GPU | Fake H100 (compute capability 9.0) |" in card


def test_timings_are_kept(build, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _, trt = build()
    assert trt.built.config.given == b""
    (kept,) = cache_folder("tensorrt").glob("fake-h100-11-1-0-106.timings")
    assert kept.read_bytes() == b"how long it took"
    _, trt = build(force=True)
    assert trt.built.config.given == b"how long it took"


def test_progress(build):
    seen = []
    build(progress=lambda *step: seen.append(step))
    phases = [step for step in seen if step[0] in ("Building", "Timing")]
    assert phases == [
        ("Building", 0, 2),
        ("Timing", 0, 1),
        ("Timing", 1, 1),
        ("Timing", 1, 1),
        ("Building", 1, 2),
        ("Building", 2, 2),
    ]


def test_interrupted(build, tmp_path):
    def progress(stage, done, total):
        if (stage, done) == ("Timing", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(progress=progress)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_no_exception_goes_through_tensorrt(tensorrt, failing):
    """It is kept until the build has come back, wherever it was raised."""
    tensorrt()
    seen = []

    def progress(stage, done, total):
        seen.append(done)
        if len(seen) == failing + 1:
            raise OSError("the terminal is gone")

    watch = build_module._Watch(progress)
    monitor = build_module._monitor(watch)
    monitor.phase_start("Building", "", 2)
    going = monitor.step_complete("Building", 0)
    monitor.phase_finish("Building")
    assert going == (failing == 2)
    assert isinstance(watch.failure, OSError)
    assert seen == [0, 1, 2][: failing + 1]


def test_no_room_for_the_engine(checkpoints, tensorrt, tmp_path, monkeypatch):
    """How large a checkpoint's graph is, and so its engine, is known when it is written."""
    usage = namedtuple("usage", "total used free")

    def disk_usage(path):
        written = any(tmp_path.rglob("model.onnx_data"))
        return usage(10**12, 0, 1000 if written else 10**12)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    tensorrt()
    with pytest.raises(InputError, match=r"0\.00 GB free beside the graph, and its engine needs"):
        embedport.export(checkpoints("blocks"), tmp_path / "out", format="tensorrt")
    assert list(tmp_path.iterdir()) == []


def test_tensorrt_refuses(graphs, tensorrt, tmp_path):
    trt = tensorrt()
    trt.parse_error = ("layers.0/MatMul_7", "no such thing")
    with pytest.raises(VerificationError, match=r"the graph: layers.0/MatMul_7: no such thing"):
        embedport.export(graphs().folder, tmp_path / "out", format="tensorrt")
    trt = tensorrt()
    trt.fails = True
    with pytest.raises(VerificationError, match="could not build an engine on Fake H100"):
        embedport.export(graphs().folder, tmp_path / "out", format="tensorrt")
    assert list(tmp_path.iterdir()) == []


class TestWithoutAnEngine:
    """The stubs of TensorRT are installed here, and TensorRT is not."""

    def test_too_old(self, graphs, tensorrt, tmp_path):
        tensorrt("10.13.0.35")
        artifact = embedport.export(graphs().folder, tmp_path / "out", format="tensorrt")
        assert (artifact.manifest.format, artifact.manifest.engine) == ("onnx", None)
        assert {"engine/build.sh", "engine/check.npz"} <= set(artifact.manifest.files)
        assert obstacle() == (
            "TensorRT 10.13.0.35 has no RMSNormalization: 10.15 or later is needed"
        )

    def test_why(self, cuda, tensorrt):
        assert "tensorrt is not installed" in str(obstacle())
        tensorrt()
        assert obstacle() is None
        cuda.device = None
        assert obstacle() == (
            "no GPU can be used here (CUDA: cudaGetDeviceCount failed with cudaErrorNoDevice)"
        )

    @pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", "int8", "int4"])
    def test_what_is_written(self, checkpoints, tmp_path, precision):
        artifact = embedport.export(
            checkpoints("blocks"), tmp_path / "out", format="tensorrt", precision=precision
        )
        manifest = artifact.manifest
        assert (manifest.format, manifest.precision) == ("onnx", precision)
        assert manifest.engine is None
        assert manifest.graph is not None
        assert manifest.graph.arithmetic == ("fp16" if precision == "fp16" else "bf16")
        assert "engine/model.plan" not in manifest.files
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
        embedder = embedport.load(tmp_path / "out")
        with np.load(tmp_path / "out" / "engine" / "check.npz") as file:
            check = dict(file)
        found = embedder.model(check["input_ids"], check["attention_mask"])
        np.testing.assert_allclose(found, check["sentence_embedding"], atol=0.02)

    def test_build_script(self, graphs, tmp_path):
        embedport.export(
            graphs().folder,
            tmp_path / "out",
            format="tensorrt",
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

    @pytest.mark.parametrize("task", ["embedding", "reranker"])
    @pytest.mark.parametrize("spoiled", [False, True])
    def test_check_script(self, graphs, tmp_path, monkeypatch, task, spoiled):
        """With a Polygraphy that runs the graph in onnxruntime."""
        embedport.export(graphs(task).folder, tmp_path / "out", format="tensorrt")
        model = embedport.load(tmp_path / "out", device="cpu").model
        output = graphs(task).manifest.graph.outputs[0]

        class Runner:
            def __init__(self, engine):
                assert engine == ("network", 2)

            def __enter__(self):
                return self

            def __exit__(self, *error):
                pass

            def infer(self, feeds):
                found = model(feeds["input_ids"], feeds["attention_mask"])
                return {output: found[..., ::-1] + 0.1 if spoiled else found}

        polygraphy = ModuleType("polygraphy.backend.trt")
        vars(polygraphy).update(
            CreateConfig=lambda profiles: len(profiles),
            EngineFromNetwork=lambda network, config: (network, config),
            NetworkFromOnnxPath=lambda path, strongly_typed: "network",
            Profile=lambda: SimpleNamespace(add=lambda name, least, best, most: None),
            TrtRunner=Runner,
        )
        for name in ("polygraphy", "polygraphy.backend", "polygraphy.backend.trt"):
            monkeypatch.setitem(sys.modules, name, polygraphy)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(tmp_path / "out" / "engine" / "check.py"))
        assert bool(ended.value.code) == spoiled

    def test_again_without_the_engine(self, build, monkeypatch, tmp_path):
        """An artifact with an engine is a source too, and leaves the engine behind."""
        artifact, _ = build()
        monkeypatch.delitem(sys.modules, "tensorrt")
        again = embedport.export(artifact.folder, tmp_path / "again", format="tensorrt")
        assert (again.manifest.format, again.manifest.engine) == ("onnx", None)
        assert "engine/model.plan" not in again.manifest.files


def test_bad_requests(artifacts_of_other_dialects, checkpoints, graphs, tmp_path):
    def export(source, **options):
        embedport.export(source, tmp_path / "out", format="tensorrt", **options)

    with pytest.raises(InputError, match=r"precision should be one of fp16, bf16, .*'fp32'"):
        export(checkpoints("blocks"), precision="fp32")
    with pytest.raises(InputError, match="at least one --profile"):
        export(checkpoints("blocks"), profiles=[])
    with pytest.raises(InputError, match=r"should be one of none, ampere\+, same-capability"):
        export(checkpoints("blocks"), hardware_compatible="all")
    with pytest.raises(InputError, match="is an artifact in fp32: it takes none of --precision"):
        export(graphs().folder, precision="bf16")
    with pytest.raises(InputError, match="the pooled output in the ort dialect, and TensorRT"):
        export(artifacts_of_other_dialects)
    with pytest.raises(VerificationError, match="blocks of 64 do not divide the 160 inputs"):
        export(checkpoints("kv2"), precision="int4")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def artifacts_of_other_dialects(tmp_path_factory, checkpoints):
    folder = tmp_path_factory.mktemp("ort") / "artifact"
    return embedport.export(checkpoints("blocks"), folder, dialect="ort").folder


def test_inspect(build, capsys, monkeypatch):
    from embedport.cli import main

    artifact, _ = build(profiles=PROFILES)
    monkeypatch.setattr(sys, "argv", ["embedport", "inspect", str(artifact.folder)])
    with pytest.raises(SystemExit):
        main()
    shown = " ".join(capsys.readouterr().out.split())
    assert (
        "engine/model.plan: TensorRT 11.1.0.106 on Fake H100; batches 1x1:2x8:4x64, 2x16" in shown
    )
