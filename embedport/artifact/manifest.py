"""The manifest: embedport.json, which describes an artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..checkpoint.hub import pin
from ..checkpoint.pipeline import ACTIVATIONS, ROLES, Inputs, Outputs
from ..checkpoint.spec import Task
from ..errors import ArtifactError
from ..files import is_file_name
from ..integrity import FileRecord
from ..machine.engine import EngineRecord
from ..records import read_record
from ..strict_json import load_json

FORMAT_VERSION = 5
# Without one of these the default would give other vectors. Early artifacts lack later fields.
NEEDED = {
    "inputs": ("form", "prompts", "default_prompt"),
    "outputs": ("pooling", "steps", "answers"),
}

Format = Literal["onnx", "tensorrt", "checkpoint"]
OUTPUTS = ("pooled", "hidden")


@dataclass(frozen=True)
class AdapterRecord:
    """The adapter that was merged into a checkpoint's weights.

    Attributes:
        id: Its folder or hub id.
        revision: Its commit on the hub.
        rank: LoRA rank (r).
        alpha: LoRA scaling numerator (lora_alpha).
        targets: Names of the modules that it changes, without layer numbers.
    """

    id: str
    revision: str | None
    rank: int
    alpha: float
    targets: tuple[str, ...]

    @property
    def pinned(self) -> str:
        """Id and revision in the form that `fetch` accepts."""
        return pin(self.id, self.revision)

    def __str__(self) -> str:
        return f"{self.pinned}: rank {self.rank}, alpha {self.alpha:g}, {', '.join(self.targets)}"


@dataclass(frozen=True)
class SourceRecord:
    """The checkpoint an artifact was made from.

    Attributes:
        id: Its folder or hub id.
        revision: Its commit on the hub.
        files: File name to sha256, of its shards and the adapter's files.
        adapter: The adapter that was merged into its weights, if any.
        original: For a quantized checkpoint, the options of `embedport validate` that name the
            checkpoint that it was quantized from; None for a checkpoint that is not quantized.
    """

    id: str
    revision: str | None
    files: Mapping[str, str]
    adapter: AdapterRecord | None = None
    original: tuple[str, ...] | None = None

    @property
    def pinned(self) -> str:
        """Id and revision in the form that `fetch` accepts, without the adapter."""
        return pin(self.id, self.revision)

    @property
    def options(self) -> tuple[str, ...]:
        """Command line options of `embedport validate`: the reference of what was made from this.

        A quantized checkpoint is no reference: its original is.
        """
        if self.original is not None:
            return self.original
        adapter = () if self.adapter is None else ("--adapter", self.adapter.pinned)
        return ("--reference", self.pinned, *adapter)


@dataclass(frozen=True)
class ContinuationRecord:
    """The graph for rows that continue a KV cache: its path in the folder, and its runtime."""

    path: str
    requires: str


@dataclass(frozen=True)
class SharedRecord:
    """The files that other software opens; their weights are in the graph's own data file.

    Attributes:
        consumers: The programs that the files were written for.
        paths: Paths of the graph that they open; empty if it is the artifact's own graph.
        outputs: Names of that graph's outputs.
        opset: Its ONNX opset version.
        requires: The onnxruntime that it needs.
        openvino: The path of OpenVINO's model, if there is one; it has weights of its own.
    """

    consumers: tuple[str, ...]
    paths: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    requires: str
    openvino: str | None


@dataclass(frozen=True)
class GraphRecord:
    """An artifact's ONNX graph.

    Attributes:
        path: Its path in the folder.
        dialect: "ort" or "standard".
        opset: The ONNX opset version.
        inputs: Names of the inputs.
        outputs: Names of the outputs, first the one that embedport reads.
        output: "pooled" (one vector or score per text) or "hidden" (one vector per token).
        arithmetic: "fp32", "fp16" or "bf16": the dtype of all that is not quantized.
        kept_in_fp32: Parts that an fp16 graph computes in fp32 because fp16 would overflow.
        masked: Whether attention takes a mask, and so a full tokens x tokens score matrix.
        continuation: The same graph with a KV cache input, for rows with a common prefix; None if
            there is none.
        limits_pairs: Whether the codes of weights used with 8-bit activations are limited so that
            no CPU saturates (see `quantize.pairs`). Early artifacts lack the field.
        shared: The files that other software opens; None if none were asked for.
    """

    path: str
    dialect: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    output: str
    arithmetic: str
    kept_in_fp32: tuple[str, ...]
    masked: bool = False
    continuation: ContinuationRecord | None = None
    limits_pairs: bool = False
    shared: SharedRecord | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all ONNX graphs in the folder, the main one first."""
        continuation = () if self.continuation is None else (self.continuation.path,)
        return (self.path, *continuation, *(() if self.shared is None else self.shared.paths))

    @property
    def has_functions(self) -> bool:
        """Whether parts of the graph are functions that embedport's kernels compute on a CPU."""
        return self.dialect == "ort" and self.arithmetic == "fp32"


@dataclass(frozen=True)
class Manifest:
    """The contents of embedport.json.

    Attributes:
        task: "embedding" or "reranker".
        format: "onnx"; "tensorrt" for a graph with an engine built from it; or "checkpoint" for
            safetensors in the hub's layout.
        precision: For a graph: "fp32", "fp16", "bf16", "int8", "int8-weight", "int4", "fp8", or
            "mixed" if a recipe or a search chose a format for each matrix. For a checkpoint: the
            quantization method, "bnb-int8", "bnb-nf4", "gptq", "gptq-8", "awq", "w8a8" or "fp8";
            or "fp32", "fp16" or "bf16" if it is not quantized.
        graph: The graph; None for a checkpoint.
        embedding_dim: Width of a vector; None for a reranker.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        vocab_size: Token ids are below this.
        max_length: Default limit in tokens; longer texts are truncated.
        max_position_embeddings: Maximum tokens of a text.
        inputs: How inputs become tokens.
        outputs: How the last layer's hidden states become vectors or scores.
        source: The checkpoint that it was made from.
        requires: Runtime package and its lowest version.
        versions: Package to version, of the packages that made the artifact.
        files: Relative path to size and sha256, for every file but the manifest and the card.
        engine: The engine, for the format "tensorrt".
        recipe: How the matrices are quantized, and the calibration data; None if they are not.
        ranges: Vector width to the minimum and maximum of each value, for 8-bit vectors; None
            until they are measured.
        parity: Figures of the last validation, or None.
    """

    task: Task
    format: Format
    precision: str
    graph: GraphRecord | None
    embedding_dim: int | None
    hidden_size: int
    num_heads: int
    vocab_size: int
    max_length: int
    max_position_embeddings: int
    inputs: Inputs
    outputs: Outputs
    source: SourceRecord
    requires: str
    versions: Mapping[str, str]
    files: Mapping[str, FileRecord]
    engine: EngineRecord | None = None
    recipe: Mapping[str, Any] | None = None
    ranges: Mapping[str, Any] | None = None
    parity: Mapping[str, Any] | None = None

    @property
    def prompts(self) -> Mapping[str, str]:
        """Prompt name to the text that is put before an input."""
        return self.inputs.prompts

    def to_json(self) -> str:
        """The text of embedport.json."""
        values = {"format_version": FORMAT_VERSION, **asdict(self)}
        return json.dumps(values, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Manifest:
        """Read embedport.json.

        Raises:
            ArtifactError: It is missing or damaged, lacks a key, has an unknown one, or has an
                unsupported format version.
        """
        try:
            values = load_json(path)
            version = values.pop("format_version")
        except FileNotFoundError:
            raise ArtifactError(
                f"{path} is missing: {path.parent} is not an artifact; make one with "
                "`embedport export onnx`"
            ) from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ArtifactError(f"{path} is not a manifest: {error!r}") from error
        if version == 4:  # written by embedport 0.1, before it had inputs and outputs
            values |= _read_version_4(values.get("task"), values.pop("prompts", None))
        elif version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise ArtifactError(
                f"{path} has format version {version!r}, and this embedport reads "
                f"{FORMAT_VERSION}: {'upgrade embedport' if newer else 'make the artifact again'}"
            )
        names = {field.name for field in fields(cls)}
        if values.keys() != names:
            difference = ", ".join(sorted(values.keys() ^ names))
            raise ArtifactError(f"{path}: missing or unknown keys: {difference}")
        try:
            for part, keys in NEEDED.items():
                if missing := [key for key in keys if key not in values[part]]:
                    raise ValueError(f"its {part} lack {missing[0]}")
            manifest = read_record(cls, values)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error
        for record, formats in (("graph", ("onnx", "tensorrt")), ("engine", ("tensorrt",))):
            if (values[record] is not None) != (manifest.format in formats):
                raise ArtifactError(
                    f"{path}: format {manifest.format!r} does not go with {record} "
                    f"{values[record]!r}"
                )
        for key, value, expected, holds in _checks(manifest):
            if not holds:
                raise ArtifactError(f"{path}: {key} should be {expected}, found {value!r:.80}")
        graph, engine = manifest.graph, manifest.engine
        parts = [*(graph.paths if graph else ())]
        if graph and graph.shared and graph.shared.openvino:
            parts.append(graph.shared.openvino)
        if engine:
            parts.append(engine.path)
        folders = [dense.path for dense in manifest.outputs.dense]
        for name in (*parts, *folders, *manifest.files):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{path}: {name!r} is outside the artifact's folder")
            if not all(map(is_file_name, name.split("/"))):
                raise ArtifactError(f"{path}: {name[:100]!r} cannot be a file's name")
        if unlisted := [name for name in parts if name not in manifest.files]:
            raise ArtifactError(f"{path}: {unlisted[0]!r} is not among its files")
        return manifest


def _checks(manifest: Manifest) -> Iterator[tuple[str, Any, str, bool]]:
    """(key, value, what it should be, whether it is that) of what annotations do not say."""
    inputs, outputs = manifest.inputs, manifest.outputs
    names = (None, *ROLES, *inputs.prompts)
    default = inputs.default_prompt
    yield "default prompt", default, " or ".join(map(str, names)), default in names
    for dense in outputs.dense:
        kind = dense.activation
        yield "activation of Dense", kind, " or ".join(ACTIVATIONS), kind in ACTIVATIONS
        for key, size in (("in", dense.in_features), ("out", dense.out_features)):
            yield f"{key}_features of Dense", size, "a size", _is_size(size)
    yield from _check_quantization(manifest.recipe, manifest.ranges)
    for key in ("hidden_size", "num_heads", "vocab_size", "max_length", "max_position_embeddings"):
        yield key, getattr(manifest, key), "a size", _is_size(getattr(manifest, key))
    dim, truncate = manifest.embedding_dim, outputs.truncate
    for key, size in (("embedding_dim", dim), ("truncate", truncate)):
        yield key, size, "a size", size is None or _is_size(size)
    if truncate is not None and dim is not None:
        yield "embedding_dim", dim, "within truncate", dim <= truncate
    yield "pooling", outputs.pooling, "names", bool(outputs.pooling)
    for answer in outputs.answers or ():
        is_id = answer is None or 0 <= answer < manifest.vocab_size
        yield "answers", answer, "token ids", is_id
    for name, record in manifest.files.items():
        yield f"size of {name[:100]!r}", record.size, "a size", _is_size(record.size, least=0)
    if (graph := manifest.graph) is not None:
        yield "graph's output", graph.output, " or ".join(OUTPUTS), graph.output in OUTPUTS
        yield "graph's outputs", graph.outputs, "names", bool(graph.outputs)


def _check_quantization(recipe: Any, ranges: Any) -> Iterator[tuple[str, Any, str, bool]]:
    """As `_checks`, of how matrices and vectors are quantized."""
    if isinstance(recipe, dict):
        formats = recipe.get("formats")
        yield "the recipe's formats", formats, "texts by name", _are_texts(formats)
        algorithm, calibration = recipe.get("algorithm"), recipe.get("calibration")
        yield "the recipe's algorithm", algorithm, "a name", isinstance(algorithm, str)
        expected = "null, or texts, source and sha256"
        yield "the recipe's calibration", calibration, expected, _is_calibration(calibration)
    if isinstance(ranges, dict):
        for width, bounds in ranges.items():
            expected = f"two lists of {width} numbers, minima and maxima"
            yield f"ranges at {width[:20]}", bounds, expected, _are_ranges(width, bounds)


def _are_texts(value: Any) -> bool:
    """Whether a value is an object of texts."""
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _is_calibration(value: Any) -> bool:
    """Whether a value says which texts calibrated; older artifacts do not count their tokens."""
    if not isinstance(value, dict):
        return value is None
    counts = (value.get("texts"), value.get("tokens", 0))
    names = (value.get("source"), value.get("sha256"))
    return all(type(each) is int for each in counts) and all(isinstance(n, str) for n in names)


def _are_ranges(width: str, bounds: Any) -> bool:
    """Whether a width's ranges are a list of minima and one of maxima, none below its minimum."""
    if not isinstance(bounds, list) or len(bounds) != 2:
        return False
    for bound in bounds:
        if not isinstance(bound, list) or str(len(bound)) != width:
            return False
        if not all(type(x) in (int, float) and math.isfinite(x) for x in bound):
            return False
    return all(low <= high for low, high in zip(*bounds, strict=True))


def _read_version_4(task: Any, prompts: Any) -> dict[str, Any]:
    """The inputs and outputs that version 4 lacked: those of Qwen's own models."""
    if task == "embedding":
        inputs, outputs = Inputs(prompts=prompts), Outputs()
    else:
        inputs, outputs = Inputs(form="instruct"), Outputs(steps=())
    return {"inputs": asdict(inputs), "outputs": asdict(outputs)}


def _is_size(value: int, *, least: int = 1) -> bool:
    return least <= value < 1 << 53
