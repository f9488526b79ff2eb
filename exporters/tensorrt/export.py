"""Export a checkpoint, or an artifact of the standard dialect, to an artifact with an engine.

    onnx/model.onnx          the graph that the engine is built from
    engine/model.plan        the engine, if there was a library to build it
    engine/build.sh          a build with trtexec, for the GPU that it runs on
    engine/check.py, .npz    a build and a check with Polygraphy

Without a library the artifact has the graph only, and runs in onnxruntime like any other.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx_ir as ir

from ...artifact.folder import CARD, Artifact, staged, write_manifest
from ...artifact.manifest import GraphRecord, Manifest
from ...artifact.witness import WITNESS
from ...checkpoint.spec import Task
from ...errors import DeviceError, InputError
from ...files import MANIFEST
from ...machine.engine import Compatibility, Library, Profile, parse_capability
from ...machine.gpu import load_tensorrt
from ...quantize.formats import FP8, QUANTIZED
from ...tables import size_words
from ...texts.prompts import EmbeddingTokenizer, RerankerTokenizer
from ...texts.samples import builtin_pairs, builtin_samples
from ..configuration import read_configuration
from ..graph.dialect_table import find_dialect
from ..onnx.export import PACKAGES, export
from ..onnx.verify import verify_graph
from ..onnx.witness import make_witness
from ..provenance import Progress, counted, versions
from .build import build_engine, obstacle
from .options import EngineOptions, Target
from .scripts import polygraphy_script, trtexec_script
from .versions import check_capabilities

PLAN = "engine/model.plan"
PRECISIONS = ("fp16", "bf16", "fp8", "int8", "int4")
# One profile for a few texts, short or long, and one for many.
PROFILES = ("1x1:1x32:8x8192", "1x1:32x128:256x512")
# The check's limits: 16-bit arithmetic runs in another order, and 8 or 4 bits add to it.
MIN_COSINE, MAX_DIFFERENCE = 0.999, 0.005


def export_tensorrt(
    source: str | Path,
    output: str | Path,
    *,
    precision: str | None = None,
    fast: bool = False,
    profiles: Sequence[str] | None = None,
    target: Target | None = None,
    compute_capabilities: Sequence[str] = (),
    version_compatible: bool = False,
    hardware_compatible: Compatibility = "none",
    revision: str | None = None,
    task: Task | None = None,
    adapter: str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> Artifact:
    """Build a TensorRT engine; without a library for it, write everything needed to build one.

    TensorRT for RTX builds on any machine for the GPUs of RTX; TensorRT builds on the GPU that the
    engine is for.

    Args:
        source: A checkpoint's folder, a hub id, or an artifact with a graph of the standard
            dialect, made with any options of `export`.
        output: The artifact's folder; it appears only when it is complete and checked.
        precision: For a checkpoint: "bf16", the default; "fp16" (parts that would overflow stay
            in fp32); "fp8" and "int8" (weights and activations, one activation scale per token);
            or "int4" (weights in groups of 128). All but "fp16" compute in bf16 with an fp32
            residual stream.
        fast: Whether "int4" is rounded to nearest: seconds, not minutes, and worse.
        profiles: Batches to tune for, each MIN:OPT:MAX in rows x tokens; by default `PROFILES`, cut
            to the length that the model takes.
        target: "rtx" for GPUs of RTX, "this-gpu" for the one of this machine; by default this
            GPU if there is TensorRT, otherwise RTX.
        compute_capabilities: For "rtx", the compute capabilities to build for, such as "8.9";
            by default all that can run the graph.
        version_compatible: Whether later TensorRT versions of the same major version load the
            engine.
        hardware_compatible: Where the engine runs besides the kind of GPU that it is built on:
            "none", "ampere+" or "same-capability".
        revision: A branch, tag or commit, for a hub id.
        task: "embedding" or "reranker", if the checkpoint's files do not tell.
        adapter: The folder or hub id of a LoRA adapter to merge into the checkpoint's weights.
        force: Whether to replace an existing artifact.
        progress: Called with (stage, done, total).

    Returns:
        An artifact of format "tensorrt" with an engine, or of format "onnx" without one; then
        `build.obstacle` returns the reason for each library.

    Raises:
        InputError: An option is wrong, the output exists, or the disk is too small.
        CheckpointError: The checkpoint is not a complete Qwen3 checkpoint.
        ArtifactError: The artifact is damaged.
        DeviceError: `target` is given, and its library cannot build here.
        VerificationError: The graph does not run, TensorRT rejects it, or the engine would
            multiply in other types.

    >>> artifact = export_tensorrt(checkpoint, folder / "tea-rtx", target="rtx")  # doctest: +SKIP
    >>> artifact.manifest.engine.builder  # doctest: +SKIP
    'TensorRT for RTX 1.7.1.116'
    """
    options = EngineOptions(
        tuple(map(Profile.parse, PROFILES if profiles is None else profiles)),
        version_compatible,
        hardware_compatible,
        target,
        tuple(map(parse_capability, compute_capabilities)),
    )
    if precision not in (None, *PRECISIONS):
        raise InputError(f"precision should be one of {', '.join(PRECISIONS)}, found {precision!r}")
    if fast and precision != "int4":
        raise InputError("`fast` is of the precision int4, which runs calibration texts without it")
    source_artifact = _open(source, precision, revision, task, adapter)
    # Writing the graph takes minutes: everything that does not need it is checked first.
    if source_artifact:
        model = source_artifact.manifest
    else:
        model = read_configuration(source, revision, task, adapter)
    if model.task == "embedding" and not model.outputs.include_prompt:
        raise InputError(
            f"{source}: the model leaves its prompts out of pooling (include_prompt of its "
            "Pooling is false), and engines take texts only; export onnx runs it"
        )
    options = _fit(options, model.max_position_embeddings, explicit=profiles is not None)
    size = source_artifact.size if source_artifact else 0
    library = _choose_library(options)
    with staged(Path(output), force=force, needs=2 * size) as folder:
        if source_artifact:
            manifest = _copy(source_artifact, folder)
            source_artifact.check_unchanged()
            if WITNESS not in manifest.files:
                make_witness(folder, manifest)
        else:
            manifest = _export_graph(
                str(source), folder, precision or "bf16", fast, revision, task, adapter, progress
            )
        graph = manifest.graph
        assert graph is not None
        if library is not None:
            _check_room(folder, graph)
            record = build_engine(
                library, folder / graph.path, folder / PLAN, PLAN, graph.inputs, options, progress
            )
            manifest = replace(
                manifest,
                format="tensorrt",
                engine=record,
                requires=f"{library}=={record.tensorrt}",
                versions=versions(PACKAGES) | {library: record.tensorrt},
            )
        _write_scripts(folder, manifest, graph, options, progress)
        write_manifest(folder, manifest, Path(output).absolute().name)
    return Artifact.open(output)


def _choose_library(options: EngineOptions) -> Library | None:
    """The library to build with; None if none can be used here.

    Raises:
        DeviceError: A target is given, and its library cannot build here.
        InputError: The library does not build for a compute capability.
    """
    reasons = [obstacle(library) for library in options.libraries]
    for library, reason in zip(options.libraries, reasons, strict=True):
        if reason is None:
            if options.capabilities:
                check_capabilities(load_tensorrt(library), options.capabilities)
            return library
    if options.target is not None:
        raise DeviceError(f"`target` {options.target}: {reasons[0]}")
    return None


def _fit(options: EngineOptions, longest: int, *, explicit: bool) -> EngineOptions:
    """Cut the default profiles to the model's length, in tokens.

    Raises:
        InputError: A profile that was asked for is longer.
    """
    for profile in options.profiles:
        if explicit and profile.max[1] > longest:
            raise InputError(
                f"profile {profile} has texts of {profile.max[1]:,} tokens, and the model takes "
                f"{longest:,} (max_position_embeddings)"
            )
    return replace(options, profiles=tuple(profile.cut(longest) for profile in options.profiles))


def _open(
    source: str | Path,
    precision: str | None,
    revision: str | None,
    task: Task | None,
    adapter: str | Path | None,
) -> Artifact | None:
    """The source, if it is an artifact with a graph of the standard dialect; None otherwise."""
    if not (Path(source).expanduser() / MANIFEST).is_file():
        return None
    artifact = Artifact.open(source)
    graph = artifact.manifest.graph
    if graph is None:
        return None  # a quantized checkpoint, which export reads
    if precision or revision or task or adapter:
        raise InputError(
            f"{source} is an artifact in {artifact.manifest.precision}: it takes none of "
            "`precision`, `revision`, `task` and `adapter`"
        )
    if graph.dialect != "standard" or graph.output != "pooled":
        raise InputError(
            f"{source} has the {graph.output} output in the {graph.dialect} dialect, and TensorRT "
            "needs the pooled one in the standard dialect: `embedport export onnx --dialect "
            "standard`"
        )
    return artifact


def _copy(artifact: Artifact, folder: Path) -> Manifest:
    """Copy an artifact's files and manifest, without an engine and its scripts."""
    for name in artifact.manifest.files:
        if name.startswith("engine/"):
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact.folder / name, folder / name)
    requires = find_dialect("standard").requires
    return replace(artifact.manifest, format="onnx", engine=None, requires=requires, parity=None)


def _export_graph(
    source: str,
    folder: Path,
    precision: str,
    fast: bool,
    revision: str | None,
    task: Task | None,
    adapter: str | Path | None,
    progress: Progress,
) -> Manifest:
    """Export the graph into the folder, in 16-bit arithmetic."""
    with TemporaryDirectory(dir=folder) as temporary:
        artifact = export(
            source,
            Path(temporary) / "artifact",
            revision=revision,
            task=task,
            adapter=adapter,
            precision=precision,
            fast=fast,
            arithmetic="bf16" if precision in QUANTIZED and precision != FP8 else None,
            dialect="standard",
            progress=progress,
        )
        for path in artifact.folder.iterdir():
            if path.name not in (MANIFEST, CARD):
                path.rename(folder / path.name)
    return artifact.manifest


def _check_room(folder: Path, graph: GraphRecord) -> None:
    """Check the free space: the engine will be about as large as the written graph."""
    needed = sum(path.stat().st_size for path in (folder / graph.path).parent.iterdir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(
            f"{folder.parent} has {size_words(free)} free beside the graph, and its engine needs "
            f"about {size_words(needed)}"
        )


def _write_scripts(
    folder: Path,
    manifest: Manifest,
    graph: GraphRecord,
    options: EngineOptions,
    progress: Progress,
) -> None:
    """Write engine/: scripts that build and check the engine on other machines."""
    engine = folder / "engine"
    engine.mkdir(exist_ok=True)
    from_engine = f"../{graph.path}"
    script = trtexec_script(from_engine, graph.inputs, options)
    (engine / "build.sh").write_bytes(script.encode())
    (engine / "build.sh").chmod(0o755)
    check = polygraphy_script(
        from_engine,
        graph.outputs[0],
        options.profiles,
        min_cosine=MIN_COSINE,
        max_difference=MAX_DIFFERENCE,
    )
    (engine / "check.py").write_bytes(check.encode())
    first = options.profiles[0]
    ids = _sample(folder, manifest)[: first.max[1]]
    scopes = len({str(node.name).split("/")[0] for node in ir.load(folder / graph.path).graph})
    advance = counted(progress, "check", scopes)
    expected = verify_graph(folder / graph.path, ids, advance)
    # The first profile's shape; further rows repeat the text.
    rows, tokens = first.padded(1, len(ids))
    input_ids = np.zeros((rows, tokens), np.int64)
    input_ids[:, : len(ids)] = ids
    attention_mask = np.zeros_like(input_ids)
    attention_mask[:, : len(ids)] = 1
    arrays: dict[str, np.ndarray] = {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        graph.outputs[0]: np.repeat(expected, rows, axis=0),
    }
    np.savez(engine / "check.npz", allow_pickle=False, **arrays)


def _sample(folder: Path, manifest: Manifest) -> np.ndarray:
    """Token ids of a built-in text."""
    path = folder / "tokenizer.json"
    if manifest.task == "embedding":
        tokenizer = EmbeddingTokenizer(path, manifest.max_length, manifest.inputs)
        return tokenizer.encode([builtin_samples()[0].text]).ids[0]
    pair = builtin_pairs()[0]
    pairs = RerankerTokenizer(path, manifest.max_length, manifest.inputs)
    return pairs.encode([(pair.query, pair.document)]).ids[0]
