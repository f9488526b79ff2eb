"""The manifest: embedport.json, which describes an artifact."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ..checkpoint.hub import pin
from ..checkpoint.pipeline import (
    ACTIVATIONS,
    POOLING_MODES,
    ROLES,
    Activation,
    Form,
    Inputs,
    MessageFormat,
    Outputs,
)
from ..checkpoint.spec import TASKS, Task
from ..errors import ArtifactError
from ..files import is_file_name
from ..integrity import FileRecord
from ..machine.engine import EngineRecord
from ..strict_json import load_json

FORMAT_VERSION = 5

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
            values |= _read_version_4(path, values)
            values.pop("prompts")
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
        if values["format"] not in get_args(Format):
            raise ArtifactError(
                f"{path}: format should be one of {', '.join(get_args(Format))}, found "
                f"{values['format']!r}"
            )
        for record, formats in (("graph", ("onnx", "tensorrt")), ("engine", ("tensorrt",))):
            if (values[record] is not None) != (values["format"] in formats):
                raise ArtifactError(
                    f"{path}: format {values['format']!r} does not go with {record} "
                    f"{values[record]!r}"
                )
        try:
            if values["graph"] is not None:
                values["graph"] = _read_graph(values["graph"])
            if values["engine"] is not None:
                values["engine"] = EngineRecord.from_json(values["engine"])
            values["inputs"] = _read_inputs(values["inputs"])
            values["outputs"] = Outputs.from_record(values["outputs"])
            values["source"] = _read_source(values["source"])
            values["files"] = {name: FileRecord(**f) for name, f in values["files"].items()}
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise ArtifactError(f"{path} is damaged: {error}") from error
        _check_values(path, values)
        graph: GraphRecord | None = values["graph"]
        parts = [*(graph.paths if graph else ())]
        if graph and graph.shared and graph.shared.openvino:
            parts.append(graph.shared.openvino)
        if values["engine"]:
            parts.append(values["engine"].path)
        folders = [dense.path for dense in values["outputs"].dense]
        for name in (*parts, *folders, *values["files"]):
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(f"{path}: {name!r} is outside the artifact's folder")
            if not all(map(is_file_name, name.split("/"))):
                raise ArtifactError(f"{path}: {name[:100]!r} cannot be a file's name")
        if unlisted := [name for name in parts if name not in values["files"]]:
            raise ArtifactError(f"{path}: {unlisted[0]!r} is not among its files")
        return cls(**values)


def _check_values(path: Path, values: Mapping[str, Any]) -> None:
    """Check the values that the runtimes read.

    Raises:
        ArtifactError: A value has the wrong type, or is not one of the allowed ones.
    """
    for key, value, expected, holds in _checks(values):
        if not holds:
            raise ArtifactError(f"{path}: {key} should be {expected}, found {value!r:.80}")


def _checks(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, bool]]:
    """(key, value, what it should be, whether it is that) of each value that is checked."""
    inputs: Inputs = values["inputs"]
    outputs: Outputs = values["outputs"]
    graph: GraphRecord | None = values["graph"]
    source: SourceRecord = values["source"]
    maps = {"prompts": inputs.prompts, "versions": values["versions"]}
    for key, named in (maps | {"source's files": source.files}).items():
        yield key, named, "texts by name", _are_texts(named)
    for key, value, allowed in (
        ("task", values["task"], TASKS),
        ("form of inputs", inputs.form, get_args(Form)),
        ("message_format", inputs.message_format, get_args(MessageFormat)),
        ("truncation_side", inputs.truncation_side, ("left", "right")),
        ("default prompt", inputs.default_prompt, (None, *ROLES, *inputs.prompts)),
        *(("pooling", mode, POOLING_MODES) for mode in outputs.pooling),
        *(("activation of Dense", dense.activation, ACTIVATIONS) for dense in outputs.dense),
        ("activation", outputs.activation, get_args(Activation)),
        *(("graph's output", graph.output, OUTPUTS) for graph in (graph,) if graph is not None),
    ):
        yield key, value, " or ".join(map(str, allowed)), value in allowed
    for key, value in (
        ("lower_case", inputs.lower_case),
        ("split_special_tokens", inputs.split_special_tokens),
        ("include_prompt", outputs.include_prompt),
        *((key, getattr(graph, key)) for key in ("masked", "limits_pairs") if graph is not None),
    ):
        yield key, value, "true or false", isinstance(value, bool)
    template_values = inputs.template_values
    yield "template_values", template_values, "an object", isinstance(template_values, dict)
    for key in ("recipe", "ranges", "parity"):
        yield key, values[key], "an object or null", isinstance(values[key], dict | None)
    yield from _check_quantization(values["recipe"], values["ranges"])
    for key, text in _texts(values, graph, source):
        yield key, text, "a text", isinstance(text, str)
    for key in ("hidden_size", "num_heads", "vocab_size", "max_length", "max_position_embeddings"):
        yield key, values[key], "a size", _is_size(values[key])
    for key, size in (("embedding_dim", values["embedding_dim"]), ("truncate", outputs.truncate)):
        yield key, size, "a size", size is None or _is_size(size)
    if outputs.truncate is not None and _is_size(values["embedding_dim"]):
        dim = values["embedding_dim"]
        yield "embedding_dim", dim, "within truncate", dim <= outputs.truncate
    yield "pooling", outputs.pooling, "names", bool(outputs.pooling)
    # Any number: a checkpoint's pad_token_id may be no token's.
    skipped = inputs.skipped_token
    yield "skipped_token", skipped, "a number or null", isinstance(skipped, int | None)
    for answer in outputs.answers or ():
        is_id = _is_size(answer, least=0) and answer < values["vocab_size"]
        yield "answers", answer, "token ids", answer is None or is_id
    for dense in outputs.dense:
        for key, size in (("in", dense.in_features), ("out", dense.out_features)):
            yield f"{key}_features of Dense", size, "a size", _is_size(size)
    for name, record in values["files"].items():
        yield f"size of {name[:100]!r}", record.size, "a size", _is_size(record.size, least=0)
    if graph is not None:
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


def _texts(
    values: Mapping[str, Any], graph: GraphRecord | None, source: SourceRecord
) -> Iterator[tuple[str, Any]]:
    """(key, value) of each value that should be a text."""
    yield from ((key, values[key]) for key in ("precision", "requires"))
    yield "source", source.id
    yield from (("source's original", text) for text in source.original or ())
    if source.adapter is not None:
        yield from (("adapter", text) for text in (source.adapter.id, *source.adapter.targets))
    for name, record in values["files"].items():
        yield f"sha256 of {name[:100]!r}", record.sha256
    yield from (("path of Dense", dense.path) for dense in values["outputs"].dense)
    if graph is None:
        return
    for key in ("path", "dialect", "output", "arithmetic"):
        yield f"graph's {key}", getattr(graph, key)
    for key in ("inputs", "outputs", "kept_in_fp32"):
        yield from ((f"graph's {key}", name) for name in getattr(graph, key))
    if graph.continuation is not None:
        yield "continuation's path", graph.continuation.path
        yield "continuation's requires", graph.continuation.requires
    if graph.shared is not None:
        for key in ("consumers", "paths", "outputs"):
            yield from ((f"shared {key}", name) for name in getattr(graph.shared, key))
        yield "shared requires", graph.shared.requires
        if graph.shared.openvino is not None:
            yield "path of OpenVINO's model", graph.shared.openvino


def _read_version_4(path: Path, values: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs and outputs that version 4 lacked: those of Qwen's own models."""
    prompts = values.get("prompts")
    if not isinstance(prompts, dict):
        raise ArtifactError(f"{path}: prompts should be texts by name, found {prompts!r:.80}")
    if values.get("task") == "embedding":
        inputs, outputs = Inputs(prompts=prompts), Outputs()
    else:
        inputs, outputs = Inputs(form="instruct"), Outputs(steps=())
    return {"inputs": asdict(inputs), "outputs": asdict(outputs)}


def _is_size(value: object, *, least: int = 1) -> bool:
    return type(value) is int and least <= value < 1 << 53


def _read_inputs(values: Mapping[str, Any]) -> Inputs:
    # Without one of these the default would give other tokens. Early artifacts lack later fields.
    if missing := [key for key in ("form", "prompts", "default_prompt") if key not in values]:
        raise ValueError(f"its inputs lack {missing[0]}")
    return Inputs(**values)


def _read_source(values: Mapping[str, Any]) -> SourceRecord:
    source = SourceRecord(**values)
    if source.original is not None:
        source = replace(source, original=tuple(source.original))
    if source.adapter is None:
        return source
    adapter = AdapterRecord(**values["adapter"])
    return replace(source, adapter=replace(adapter, targets=tuple(adapter.targets)))


def _read_graph(values: Mapping[str, Any]) -> GraphRecord:
    read = dict(values)
    for key in ("inputs", "outputs", "kept_in_fp32"):
        read[key] = tuple(read[key])
    if read.get("continuation") is not None:
        read["continuation"] = ContinuationRecord(**read["continuation"])
    if read.get("shared") is not None:
        shared = dict(read["shared"])
        for key in ("consumers", "paths", "outputs"):
            shared[key] = tuple(shared[key])
        read["shared"] = SharedRecord(**shared)
    return GraphRecord(**read)
