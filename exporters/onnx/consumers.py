"""Software that opens an artifact without embedport, and the files that it looks for.

    onnx/model.onnx        what others open: each token's vector and the text's, or logits
    onnx/embedport.onnx    embedport's own graph, pooled: the last layer works on one token a row
    onnx/model.onnx_data   the weights of both
    openvino/              OpenVINO's own format, which holds the weights again

The first graph is written only for software that needs something else than embedport's own graph:
without it, that one is onnx/model.onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir

from ...artifact.layout import write_json
from ...artifact.manifest import SharedRecord
from ...checkpoint.modules import TRANSFORMER
from ...checkpoint.spec import ModelSpec
from ...checkpoint.tokens import TOKENIZER_CONFIG
from ...errors import InputError, MissingPackageError, VerificationError
from ...quantize.formats import MIXED, TABLE, ends_in_part
from ...strict_json import load_json
from ...texts.prompts import load_tokenizer
from ..graph.dialect import Dialect
from ..graph.dialect_table import OLDER, find_dialect
from ..graph.precision import Precision
from ..graph.qwen3 import Design, build_model
from .saving import save_over_weights
from .verify import run_texts

GRAPH = "onnx/model.onnx"
OWN = "onnx/embedport.onnx"
OPENVINO = "openvino/openvino_model.xml"
# transformers.js' file names and its names of dtypes, by our precision.
DTYPES = {
    "fp32": ("model", "fp32"),
    "fp16": ("model_fp16", "fp16"),
    "int8": ("model_quantized", "q8"),
    "int4": ("model_q4", "q4"),
}
# The smallest cosine of the two graphs' vectors: operators of another version round differently.
MIN_COSINE = 0.999
MOST_APART = 0.01


@dataclass(frozen=True)
class Consumer:
    """How a program differs from embedport as a reader of graphs.

    Attributes:
        tokens: Whether it reads an embedder's `last_hidden_state`, and pools itself.
        plain: Whether it gives texts to the tokenizer as they are, knowing neither templates nor
            sentence-transformers' settings; of a reranker it expects logits in the first output.
        crosses: Whether it is sentence-transformers, whose CrossEncoder scores pairs.
        older: Whether its onnxruntime may be one from 1.20 on.
        named: Whether it looks for transformers.js' names.
        openvino: Whether it reads OpenVINO's format and no ONNX.
    """

    tokens: bool = False
    plain: bool = False
    crosses: bool = False
    older: bool = False
    named: bool = False
    openvino: bool = False


CONSUMERS = {
    "sentence-transformers": Consumer(tokens=True, crosses=True),
    "transformers.js": Consumer(tokens=True, plain=True, named=True),
    "tei": Consumer(older=True, plain=True),
    "fastembed": Consumer(plain=True),
    "triton": Consumer(older=True),
    "older-onnxruntime": Consumer(older=True),
    "openvino": Consumer(openvino=True, crosses=True),
}


@dataclass(frozen=True)
class Shared:
    """The files that the chosen consumers together need besides embedport's own graph.

    Attributes:
        names: The consumers, as the user gave them.
        dialect: The operators of the graph in `paths`.
        paths: Where that graph is written; empty if embedport's own serves.
        tokens: Whether it gives each token's vector.
        data: The name of the file with the weights, beside the graphs.
        openvino: Whether OpenVINO's format is written too.
        js: transformers.js' name of the dtype, if its configuration is written.
    """

    names: tuple[str, ...]
    dialect: Dialect
    paths: tuple[str, ...]
    tokens: bool
    data: str
    openvino: bool
    js: str | None

    @property
    def own(self) -> str:
        """The path of embedport's own graph."""
        return OWN if self.paths else GRAPH


def plan_shared(
    spec: ModelSpec,
    names: Sequence[str],
    dialect: Dialect,
    name: str,
    precision: Precision,
    outputs: str,
    dim: int | None,
) -> Shared:
    """Decide which files the consumers need.

    Args:
        spec: The model.
        names: Names in `CONSUMERS`.
        dialect: The dialect of embedport's own graph.
        name: The precision's name.
        precision: Its dtypes and formats.
        outputs: "pooled" or "hidden".
        dim: Leading values of the embedding to keep; None for all.

    Raises:
        InputError: A name is unknown, or a consumer cannot read the model in this precision.
    """
    if unknown := [key for key in names if key not in CONSUMERS]:
        raise InputError(
            f"`consumers` should be one of {', '.join(CONSUMERS)}, found {unknown[0]!r}"
        )
    chosen = {key: CONSUMERS[key] for key in names}

    def those(condition: Callable[[Consumer], bool]) -> str:
        return ", ".join(key for key, consumer in chosen.items() if condition(consumer))

    is_reranker = spec.task == "reranker"
    older = those(lambda consumer: consumer.older)
    named = those(lambda consumer: consumer.named)
    openvino = those(lambda consumer: consumer.openvino)
    tokens = those(lambda consumer: consumer.tokens)
    plain = those(lambda consumer: consumer.plain)
    crossing = those(lambda consumer: consumer.crosses)
    pooled = those(lambda consumer: not (consumer.tokens or consumer.openvino))
    if chosen and outputs == "hidden":
        raise InputError("`consumers` decides the outputs: give it without `outputs` hidden")
    # `dim` is for embedders only.
    if dim is not None and (tokens or openvino):
        raise InputError(
            f"{tokens or openvino} pools the tokens' vectors itself, which `dim` does not shorten: "
            "leave it out, and truncate there"
        )
    if named and is_reranker:
        raise InputError(f"{named} has no class for Qwen3's rerankers: leave it out of `consumers`")
    if plain:
        _check_plain(spec, plain)
    if crossing and spec.inputs.form == "instruct":
        _check_crossing(spec, crossing)
    if pooled and not (is_reranker or spec.outputs.include_prompt):
        raise InputError(
            f"{pooled} reads pooled vectors, and the model leaves its prompts out of pooling "
            "(include_prompt of its Pooling is false), which takes a further input"
        )
    if older:
        _check_older(spec, dialect, name, precision, older)
    if openvino:
        _check_openvino(spec, dialect, name, precision)
    if named and name not in DTYPES:
        raise InputError(f"{named} has no file name for {name}: it reads {', '.join(DTYPES)}")
    # A reranker's own graph gives the logits too, but not in the standard dialect.
    lacks_output = not is_reranker or dialect.name == "standard"
    stem, dtype = DTYPES[name] if named else ("model", None)
    paths: tuple[str, ...] = ()
    if older or (plain and is_reranker) or (tokens and lacks_output):
        paths = tuple(dict.fromkeys((GRAPH, f"onnx/{stem}.onnx")))
    return Shared(
        names=tuple(chosen),
        dialect=OLDER if older else dialect,
        paths=paths,
        tokens=bool(tokens) and not is_reranker,
        data=f"{stem}.onnx_data",
        openvino=bool(openvino),
        js=dtype,
    )


def _check_plain(spec: ModelSpec, names: str) -> None:
    """Refuse texts that are not the tokenizer's input as they are."""
    inputs, wrong = spec.inputs, None
    if inputs.form != "text" and spec.task == "reranker":
        wrong = "joins query and document without the reranker's template"
    elif inputs.form != "text":
        wrong = "puts no text into the model's chat template"
    elif inputs.lower_case:
        wrong = f"lowercases no text, as do_lower_case in {TRANSFORMER} asks"
    elif inputs.split_special_tokens:
        wrong = f"splits no special token in a text, as {TOKENIZER_CONFIG} asks"
    if wrong is not None:
        raise InputError(
            f"{names} {wrong}, and would give results without meaning: use sentence-transformers, "
            "or embedport itself"
        )


def _check_crossing(spec: ModelSpec, names: str) -> None:
    """Refuse a tokenizer that ends the model card's text, which is no pair's end."""
    path = spec.source.pipeline / "tokenizer.json"
    if load_tokenizer(path).num_special_tokens_to_add(is_pair=False):
        raise InputError(
            f"{path} adds tokens to a text, which stand before the end of the reranker's template; "
            f"{names} would add them after it, and give other scores: take its post_processor out "
            "if the model was trained without them, or use embedport itself"
        )


def _check_older(
    spec: ModelSpec, dialect: Dialect, name: str, precision: Precision, names: str
) -> None:
    """Refuse what onnxruntime 1.20 has no operators for."""
    wrong, table = None, precision.formats.get(TABLE)
    if dialect.name != "ort":
        wrong = f"the {dialect.name} dialect is ONNX opset {dialect.opsets['']}: use `dialect` ort"
    elif spec.masked_layers:
        wrong = "attention to both sides or in a window takes the Attention of ONNX opset 23"
    elif name == MIXED and not precision.formats:
        wrong = "a search may choose weights that it has no operators for: use int8 or int4"
    elif precision.compute == ir.DataType.BFLOAT16:
        wrong = "its operators do not take bf16: use fp32 or fp16"
    elif any(
        format.scheme.bits == 8 and not format.activations
        for name, format in precision.formats.items()
        if name != TABLE
    ):
        wrong = "its MatMulNBits takes 4 bits only: use `precision` int8 or int4"
    elif table is not None and ends_in_part(spec, table):
        wrong = (
            f"the embedding table's groups of {table.scheme.group_size} do not divide its width, "
            f"{spec.hidden_size}: use `precision` fp32 or fp16"
        )
    if wrong is not None:
        raise InputError(f"{names} may have onnxruntime 1.20, and {wrong}")


def _check_openvino(spec: ModelSpec, dialect: Dialect, name: str, precision: Precision) -> None:
    if (precision.formats or name == MIXED) and dialect.name != "standard":
        raise InputError(
            "OpenVINO takes quantized weights as the standard dialect stores them: give `dialect` "
            "standard with `consumers` openvino"
        )
    shapes = spec.tensor_shapes()
    for matrix, format in precision.formats.items():
        size, width = format.scheme.group_size, shapes[f"{matrix}.weight"][1]
        if matrix != TABLE and size is not None and width % size:
            raise InputError(
                f"OpenVINO reads weights in whole groups, and those of {size} do not divide the "
                f"{width} inputs of {matrix}: use `precision` fp32 or fp16, or another "
                "`group_size`"
            )
    _import_openvino()


def _import_openvino() -> ModuleType:
    try:
        return import_module("openvino")
    except ModuleNotFoundError as error:
        raise MissingPackageError("openvino is not installed: pip install openvino") from error


def write_shared(shared: Shared, design: Design, folder: Path) -> SharedRecord | None:
    """Write the graph that the consumers open, over the written graph's weights.

    Args:
        shared: What is needed.
        design: The design of embedport's own graph.
        folder: The artifact's folder, with that graph.

    Returns:
        The manifest's record; None without consumers.
    """
    if not shared.names:
        return None
    is_reranker = design.head is not None
    outputs: tuple[str, ...] = ()
    for path in shared.paths:
        graph = replace(design, dialect=shared.dialect, shared=shared.tokens or is_reranker)
        model = build_model(graph)
        save_over_weights(model, folder / shared.own, folder / path)
        outputs = tuple(str(value.name) for value in model.graph.outputs)
    if shared.openvino:
        _write_openvino(design, folder / shared.own, folder)
    if shared.js is not None:
        _write_js_config(shared.js, folder)
    return SharedRecord(
        consumers=shared.names,
        paths=shared.paths,
        outputs=outputs,
        opset=shared.dialect.opsets[""],
        requires=shared.dialect.requires,
        openvino=OPENVINO if shared.openvino else None,
    )


def _write_openvino(design: Design, own: Path, folder: Path) -> None:
    """Convert the standard dialect's graph to OpenVINO's format."""
    openvino = _import_openvino()
    temporary = own.with_name("openvino.onnx")
    try:
        graph = replace(design, dialect=find_dialect("standard"), shared=True)
        save_over_weights(build_model(graph), own, temporary)
        (folder / OPENVINO).parent.mkdir()
        model = openvino.Core().read_model(temporary)
        openvino.save_model(model, folder / OPENVINO, compress_to_fp16=False)
        del model  # it maps the weights
    finally:
        temporary.unlink(missing_ok=True)


def _write_js_config(dtype: str, folder: Path) -> None:
    """Tell transformers.js which files there are, so that it needs no options."""
    path = folder / "config.json"
    values = {"dtype": dtype, "use_external_data_format": True}
    write_json(path, load_json(path) | {"transformers.js_config": values})


def verify_shared(shared: Shared, folder: Path, ids: np.ndarray, expected: np.ndarray) -> None:
    """Check that what the consumers open gives the result of embedport's own graph.

    Args:
        shared: What was written.
        folder: The artifact's folder.
        ids: Token ids, int64 [tokens].
        expected: The own graph's result for them, float32 [1, ...].

    Raises:
        VerificationError: A graph does not run, outputs NaN, or gives something else.
    """
    if shared.paths:
        path = folder / shared.paths[0]
        _compare(path, run_texts(path, ids), expected, ids)
    if shared.openvino:
        path = folder / OPENVINO
        openvino = _import_openvino()
        hints = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", hints)
        feeds = {"input_ids": ids[None], "attention_mask": np.ones_like(ids[None])}
        results = compiled(feeds)
        outputs = {output.any_name: results[output] for output in compiled.outputs}
        _compare(path, outputs, expected, ids)
        del results, compiled


def _compare(
    path: Path, outputs: dict[str, np.ndarray], expected: np.ndarray, ids: np.ndarray
) -> None:
    if "score" in outputs:
        # NaN is wrong: OpenVINO's results, unlike onnxruntime's, are not searched for it.
        wrong = not np.abs(outputs["score"] - expected).max() <= MOST_APART
        words = f"{outputs['score']}, embedport's own graph {expected}"
    elif "sentence_embedding" in outputs:
        vectors = outputs["sentence_embedding"].ravel(), expected.ravel()
        cosine = float(vectors[0] @ vectors[1] / np.prod([np.linalg.norm(v) for v in vectors]))
        wrong, words = not cosine >= MIN_COSINE, f"vectors with a cosine of {cosine:.6f} to its own"
    else:
        shape = outputs["last_hidden_state"].shape
        wrong, words = shape[:2] != (1, len(ids)), f"hidden states of shape {shape}"
    if wrong:
        raise VerificationError(f"{path}: it gives {words} for a text of {len(ids)} tokens")
