"""Engines that TensorRT for RTX parses and builds, without a GPU.

Each precision, task and number of heads; geometries; what the builder says of its engines.
"""

import io
import json
import shutil
import signal
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import pytest

import embedport
from embedport.errors import InputError, VerificationError
from embedport.exporters.tensorrt import build as build_module
from embedport.exporters.tensorrt.build import build_engine, parse
from embedport.exporters.tensorrt.export import PRECISIONS
from embedport.exporters.tensorrt.export import PROFILES as DEFAULT
from embedport.exporters.tensorrt.layers import claimed_products
from embedport.exporters.tensorrt.options import EngineOptions
from embedport.machine.engine import Device, Profile
from embedport.machine.gpu import make_logger
from tests.synthetic import Geometry, write_checkpoint

SINGLE = ("8x128:8x128:8x128",)
FULL = ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))
# Heads of 128 as in all published models, 16 as in 0.6B and 32 as in 4B and 8B.
HEADS = {
    "embedding": Geometry(128, 2, 16, 8, 128, 192),
    "reranker": Geometry(128, 2, 32, 8, 128, 192),
}
LIKE_0_6B = Geometry(1024, 4, 16, 8, 128, 3072)


@pytest.fixture(scope="module")
def sources(tmp_path_factory, checkpoints, small_tokenizer):
    """A function (geometry, task, config) -> a checkpoint's folder, cached."""
    made = {}

    def make(geometry, task="embedding", **config):
        if isinstance(geometry, str):
            return checkpoints(geometry, task)
        key = (geometry, task, str(config))
        if key not in made:
            folder = tmp_path_factory.mktemp(task) / "checkpoint"
            made[key] = write_checkpoint(folder, geometry, task, small_tokenizer)
            if config:
                values = json.loads((folder / "config.json").read_text()) | config
                (folder / "config.json").write_text(json.dumps(values))
        return made[key]

    return make


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, sources, rtx):
    """A function (geometry, precision, task, …) -> an artifact with an engine, cached."""
    made = {}

    def make(geometry, precision, task="embedding", *, config=None, profiles=SINGLE):
        key = (geometry, precision, task, str(config))
        if key not in made:
            source = sources(geometry, task, **(config or {}))
            options: dict[str, Any] = {"precision": precision}
            folder = tmp_path_factory.mktemp(precision)
            if precision == "int4":  # calibration would change no type
                options |= {"fast": True, "arithmetic": "bf16", "dialect": "standard"}
                embedport.export(source, folder / "graph", **options)
                source, options = folder / "graph", {}
            made[key] = embedport.export_tensorrt(
                source,
                folder / "engine",
                target="rtx",
                profiles=profiles,
                **options,
            )
        return made[key]

    return make


# Precisions whose engines are built each time: each of the quantized ones.
RUN = {"embedding": ("fp8", "int4"), "reranker": ("int8",)}
CASES = [
    pytest.param(precision, task, marks=[] if precision in RUN[task] else [pytest.mark.slow])
    for task in HEADS
    for precision in PRECISIONS
]


def products(precision, layers, others):
    return {precision if precision != "int4" else "bf16": 7 * layers, **others}


@pytest.mark.parametrize(("precision", "task"), CASES)
def test_each_precision(artifacts, rtx, precision, task):
    """The embedder with the default profiles, the reranker with a single shape."""
    profiles = SINGLE if task == "reranker" else None
    artifact = artifacts(HEADS[task], precision, task, profiles=profiles)
    engine = artifact.manifest.engine
    assert (engine.library, engine.tensorrt, engine.device) == (
        "tensorrt-rtx",
        rtx.__version__,
        None,
    )
    assert tuple(map(str, engine.profiles)) == (profiles or DEFAULT)
    assert engine.capabilities == (FULL[2:] if precision == "fp8" else FULL)
    # Each product in the graph's type: the builder itself says so. int8 rotates its vectors back;
    # the head's product is one row.
    others = {"a generated kernel": 1} if task == "reranker" else {"fp32": 1}
    others = others if task == "reranker" or precision == "int8" else {}
    assert engine.products == products(precision, 2, others)
    weights = artifact.graph.with_name("model.onnx_data").stat().st_size
    assert (artifact.folder / engine.path).stat().st_size > weights


@pytest.mark.parametrize(
    ("geometry", "precision"),
    [
        pytest.param("kv1", "bf16", marks=pytest.mark.slow),
        pytest.param("kv1", "int8", marks=pytest.mark.slow),
        pytest.param("kv2", "fp16", marks=pytest.mark.slow),
        pytest.param("kv8", "fp8", marks=pytest.mark.slow),
        ("kv8", "int4"),
        pytest.param(LIKE_0_6B, "bf16", marks=pytest.mark.slow),
    ],
)
def test_geometries(artifacts, geometry, precision):
    engine = artifacts(geometry, precision).manifest.engine
    layers = {"kv1": 3}.get(geometry, 4 if geometry is LIKE_0_6B else 2)
    assert engine.products == products(
        precision, layers, {"fp32": 1} if precision == "int8" else {}
    )


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", [pytest.param(16, marks=pytest.mark.slow), 32])
def test_heads_of_128_with_a_mask(artifacts, heads, precision):
    """A sliding window gives attention a mask of its own beside the causal one."""
    geometry = replace(HEADS["embedding"], num_heads=heads)
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0}
    artifact = artifacts(geometry, precision, config=window)
    assert artifact.manifest.graph.masked
    assert artifact.manifest.engine.products == {precision: 14}


@pytest.fixture
def networks(rtx):
    """A function (graph's path) -> its network, and what keeps it alive."""

    def make(path):
        builder = rtx.Builder(logger := make_logger(rtx, lambda message, is_error: None))
        return parse(rtx, "tensorrt-rtx", builder, logger, path), (builder, logger)

    return make


@pytest.mark.parametrize(("precision", "task"), CASES)
def test_regions_in_fp32(artifacts, networks, rtx, precision, task):
    """In a strongly typed network a layer computes in its output's type."""
    network, _alive = networks(artifacts(HEADS[task], precision, task).graph)
    fp32 = rtx.DataType.FLOAT
    found = {"norm": 0, "residual": 0, "head": 0}
    for layer in map(network.get_layer, range(network.num_layers)):
        node = layer.metadata.removeprefix("[ONNX Layer: ").removesuffix("]")
        kind = node.partition("/")[2].partition("_")[0]
        types = [layer.get_output(i).dtype for i in range(layer.num_outputs)]
        if kind == "RMSNormalization" and layer.type in (
            rtx.LayerType.REDUCE,
            rtx.LayerType.NORMALIZATION,
        ):
            assert types == [fp32], layer.name
            found["norm"] += 1
        if kind == "Add" and node.startswith(("layers.", "output/")) and precision != "fp16":
            assert types == [fp32], layer.name
            found["residual"] += 1
        if node.startswith("output/") and kind in ("MatMul", "Softmax", "Sigmoid", "Div"):
            assert types == [fp32], layer.name
            found["head"] += 1
    assert found["norm"] == 2 * 4 + 1
    assert found["residual"] == (0 if precision == "fp16" else 4)
    assert found["head"] >= 1


class Wrapped:
    """A builder some of whose functions are replaced; it cannot be a base of Python's classes."""

    def __init__(self, real):
        self.real = real

    def __getattr__(self, name):
        return getattr(self.real, name)


def test_an_fp32_engine_without_tf32(graphs, rtx, tmp_path, monkeypatch):
    configs = []

    class Builder(Wrapped):
        def create_builder_config(self):
            configs.append(self.real.create_builder_config())
            return configs[-1]

    make = rtx.Builder
    monkeypatch.setattr(rtx, "Builder", lambda logger: Builder(make(logger)))
    artifact = embedport.export_tensorrt(
        graphs().folder, tmp_path / "out", target="rtx", profiles=SINGLE
    )
    assert [config.get_flag(rtx.BuilderFlag.TF32) for config in configs] == [False]
    assert make(rtx.Logger()).create_builder_config().get_flag(rtx.BuilderFlag.TF32)
    engine = artifact.manifest.engine
    assert engine is not None
    assert engine.products == {"fp32": 14}


@pytest.fixture
def build(rtx, tmp_path):
    """A function (graph, progress, **options) -> the record of an engine built from it."""

    def make(graph, progress=lambda phase, done, total: None, **options):
        profiles = tuple(map(Profile.parse, options.pop("profiles", SINGLE)))
        return build_engine(
            "tensorrt-rtx",
            graph,
            tmp_path / "engine" / "model.plan",
            "engine/model.plan",
            ("input_ids", "attention_mask"),
            EngineOptions(profiles, **options),
            progress,
        )

    return make


class TestCapabilities:
    def test_some(self, graphs, build):
        assert build(graphs().graph, capabilities=((12, 0), (8, 6))).capabilities == (
            (8, 6),
            (12, 0),
        )

    def test_unknown_to_the_library(self, checkpoints, tmp_path, rtx):
        with pytest.raises(InputError, match=r"for compute capability 7.5, 8.0, .*, found 9.0$"):
            embedport.export_tensorrt(
                checkpoints("blocks"),
                tmp_path / "out",
                compute_capabilities=["8.9", "9.0"],
            )

    def test_fp8_on_ampere(self, artifacts, build):
        """The builder's own reason is in the message: this is why fp8's default is 8.9."""
        message = r"could not build an engine: .*sm86, because .* HW-specific datatypes: fp8_e4m3"
        with pytest.raises(VerificationError, match=message):
            build(artifacts(HEADS["embedding"], "fp8").graph, capabilities=((8, 6), (8, 9)))


class TestRefused:
    def test_another_dialect(self, checkpoints, tmp_path, build):
        graph = embedport.export(checkpoints("blocks"), tmp_path / "ort", dialect="ort").graph
        message = r"model.onnx: TensorRT for RTX 1\.\S+ does not take the graph: \S+/Attention_\d+ "
        with pytest.raises(VerificationError, match=message):
            build(graph)

    def test_an_unknown_operator(self, graphs, tmp_path, build):
        folder = shutil.copytree(graphs().folder, tmp_path / "graph")
        path = folder / "onnx" / "model.onnx"
        model = ir.load(path)
        node = next(node for node in model.graph if node.op_type == "Sigmoid")
        node.op_type = "BitwiseNot"
        ir.save(model, path)
        message = rf"does not take the graph: {node.name} \(BitwiseNot\): unsupported node: false"
        with pytest.raises(VerificationError, match=message):
            build(path)

    def test_a_profile_beyond_the_graph(self, graphs, tmp_path):
        with pytest.raises(InputError, match=r"texts of 40,000 tokens, and the model takes 32,768"):
            embedport.export_tensorrt(
                graphs().folder,
                tmp_path / "out",
                target="rtx",
                profiles=["1x1:1x8:1x40000"],
            )
        assert list(tmp_path.iterdir()) == []

    def test_a_profile_beyond_the_library(self, graphs, build):
        """It warns of each profile, and gives an engine all the same."""
        profiles = [f"1x1:{opt}:1048576x1048576" for opt in ("8x128", "8x64")]
        message = "could not build an engine: Profile kMAX values"
        with pytest.raises(VerificationError, match=message) as refused:
            build(graphs().graph, profiles=profiles)
        assert str(refused.value).count("Profile kMAX values") == 1

    def test_a_lost_product(self, artifacts, build, monkeypatch):
        """The graph asks for int8; an engine that multiplies in bf16 is not written."""
        graph = artifacts(HEADS["embedding"], "int8").graph
        lost = artifacts(HEADS["embedding"], "bf16").graph
        names = zip(claimed_products(ir.load(lost)), claimed_products(ir.load(graph)), strict=False)
        renamed = dict(names)
        read = build_module.computed_products
        monkeypatch.setattr(
            build_module,
            "computed_products",
            lambda layers: {renamed.get(name, name): types for name, types in read(layers).items()},
        )
        monkeypatch.setattr(
            build_module, "claimed_products", lambda model: claimed_products(ir.load(graph))
        )
        message = (
            r"changes what is computed: \S+/MatMul_\d+ should multiply in int8, and multiplies"
        )
        with pytest.raises(VerificationError, match=message + r" in bf16 \(and 13 more\)"):
            build(lost)


def _raise():
    raise KeyboardInterrupt


class TestProgress:
    def test_phases(self, graphs, build):
        seen = []
        build(graphs().graph, lambda *step: seen.append(step))
        started = {phase for phase, done, _ in seen if done == 0}
        finished = {phase for phase, done, total in seen if done == total}
        assert started
        assert started == finished

    @pytest.mark.parametrize("interrupt", [_raise, lambda: signal.raise_signal(signal.SIGINT)])
    def test_interrupted(self, graphs, tmp_path, interrupt):
        """By an exception of the progress bar's, or by Ctrl-C at any moment."""

        def progress(stage, done, total):
            if done:
                interrupt()

        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            embedport.export_tensorrt(graphs().folder, tmp_path / "out", progress=progress)
        assert list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.parametrize("failing", [0, 1, 2])
    def test_no_exception_goes_through_tensorrt(self, rtx, failing):
        """It is kept until the build has come back, wherever it was raised."""
        seen = []

        def progress(stage, done, total):
            seen.append(done)
            if len(seen) == failing + 1:
                raise OSError("the terminal is gone")

        watch = build_module._Watch(progress)
        monitor = build_module._monitor(rtx, watch)
        monitor.phase_start("Building", "", 2)
        going = monitor.step_complete("Building", 0)
        monitor.phase_finish("Building")
        assert going == (failing == 2)
        assert isinstance(watch.failure, OSError)
        assert seen == [0, 1, 2][: failing + 1]

    def test_a_full_disk(self, graphs, build, rtx, monkeypatch):
        make = build_module._writer

        class Full(io.BytesIO):
            def write(self, data):
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(
            build_module, "_writer", lambda trt, file, relay: make(trt, Full(), relay)
        )
        with pytest.raises(OSError, match="No space left on device"):
            build(graphs().graph)


def test_the_same_engine_each_time(graphs, build, tmp_path):
    plans = []
    for _ in range(2):
        build(graphs().graph)
        plans.append((tmp_path / "engine" / "model.plan").read_bytes())
    assert plans[0] == plans[1]


class TestOnThisGPU:
    """TensorRT's side of the same code, on a GPU that is stood in for and RTX's parser and builder.

    How TensorRT itself builds has to be seen on a GPU.
    """

    # RTX calls timing caches deprecated.
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize(("version", "flags"), [("10.15.1.29", 1), ("11.1.0.106", 0)])
    def test_a_build(self, graphs, tensorrt, rtx, tmp_path, monkeypatch, version, flags):
        trt = tensorrt("tensorrt", version)
        seen = []

        class Builder(Wrapped):
            def create_network(self, flags):
                seen.append(flags)
                # 0 asks for a weakly typed network here, and for a strongly typed one in 11.
                return self.real.create_network(1)

        trt.Builder = lambda logger: Builder(rtx.Builder(logger))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        artifact = embedport.export_tensorrt(graphs().folder, tmp_path / "out", profiles=SINGLE)
        assert seen == [flags]
        engine = artifact.manifest.engine
        assert engine is not None
        assert (engine.library, engine.tensorrt, engine.capabilities) == ("tensorrt", version, ())
        assert engine.device == Device("Fake H100", (9, 0))
        assert artifact.manifest.requires == f"tensorrt=={version}"
        name = f"fake-h100-{version.replace('.', '-')}.timings"
        assert [path.name for path in (tmp_path / "cache/embedport/tensorrt").iterdir()] == [name]

    def test_compatibility(self, rtx):
        """The real names and flags, on the real configuration."""
        from embedport.exporters.tensorrt.versions import set_compatibility

        builder = rtx.Builder(rtx.Logger(rtx.Logger.ERROR))
        config = builder.create_builder_config()
        set_compatibility(rtx, config, True, "same-capability")
        assert config.get_flag(rtx.BuilderFlag.VERSION_COMPATIBLE)
