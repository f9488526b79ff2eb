"""`embedport inspect`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..machine.engine import EngineRecord
from ..records import read_record
from ..tables import count_words, fact_table, size_words
from .inputs import AdapterOption, ModelArgument, RevisionOption, TaskOption, check_task
from .outputs import stdout_console

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from ..artifact.manifest import GraphRecord
    from ..checkpoint.hub import Source
    from ..checkpoint.pipeline import Inputs
    from ..checkpoint.quantization_config import LibraryQuantization, StoredQuantization
    from ..checkpoint.spec import ModelSpec, Task

FORMS = {
    "text": "as the tokenizer takes them",
    "messages": "messages of the folder's chat template",
    "instruct": "pairs under Qwen3-Reranker's own template",
}


def inspect(
    target: ModelArgument,
    revision: RevisionOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    task: TaskOption = None,
    adapter: AdapterOption = None,
) -> None:
    """Describe an artifact or a checkpoint; an artifact's files are checked.

    Example: embedport inspect Qwen/Qwen3-Embedding-0.6B
    """
    from ..checkpoint.hub import fetch
    from ..errors import ArtifactError
    from ..files import MANIFEST

    source = fetch(target, revision, weights=False, adapter=adapter)
    if (source.folder / MANIFEST).is_file():
        facts = _artifact_facts(source)
        try:
            rows = _artifact_rows(facts)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{source.folder / MANIFEST} is damaged: {error!r}") from error
    else:
        facts = _checkpoint_facts(source, check_task(task))
        rows = _checkpoint_rows(facts)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
    else:
        stdout_console().print(fact_table(rows))


def _artifact_facts(source: Source) -> dict[str, Any]:
    """The manifest and the artifact's sizes; opening the artifact checks every file."""
    from ..artifact.folder import Artifact
    from ..artifact.sizes import checkpoint_sizes, graph_sizes

    artifact = Artifact.open(source.folder)
    manifest = artifact.manifest
    graph = manifest.graph
    return {
        "artifact": source.id,
        "bytes": artifact.size,
        "weights": graph_sizes(artifact.graph) if graph else checkpoint_sizes(artifact.folder),
        "kernels_here": _kernels(graph) if graph else None,
        **asdict(manifest),
        **_token_facts(artifact.folder, manifest.inputs, manifest.outputs.answers),
    }


def _artifact_rows(facts: dict[str, Any]) -> dict[str, str]:
    vectors = f", vectors of {facts['embedding_dim']:,}" if facts["embedding_dim"] else ""
    graph = facts["graph"]
    rows = {
        "Artifact": facts["artifact"],
        "Task": facts["task"] + vectors,
        "Precision": facts["precision"],
        "Format": facts["format"],
        "Longest text": _lengths(facts),
        **_pipeline_rows(facts),
        "Weights": "\n".join(_part(part, sizes) for part, sizes in facts["weights"].items()),
        "Source": _at(facts["source"]["id"], facts["source"]["revision"]),
        "Runtime": facts["requires"],
        "Made with": ", ".join(f"{name} {version}" for name, version in facts["versions"].items()),
        "Parity": _verdict(facts["parity"]),
        "Files": f"{size_words(facts['bytes'])}, all as the manifest says\n"
        + "\n".join(f"{name}, {size_words(f['size'])}" for name, f in facts["files"].items()),
    }
    if graph is not None:
        rows["Format"] += (
            f", {graph['dialect']} dialect, opset {graph['opset']}: "
            f"{', '.join(graph['inputs'])} to {', '.join(graph['outputs'])}"
        )
        rows["Kernels here"] = facts["kernels_here"]
        if shared := graph["shared"]:
            rows["Opened by"] = _openers(shared)
    if facts["engine"]:
        engine = read_record(EngineRecord, facts["engine"])
        rows["Engine"] = (
            f"{engine.path}: {engine.builder}; {engine.targets}; batches "
            f"{', '.join(map(str, engine.profiles))}"
        )
    if facts["recipe"] is not None:
        from ..artifact.card import recipe_words

        rows["Precision"] += f"; {recipe_words(facts['recipe'], facts['task'])}"
    elif graph is not None and facts["precision"] != "fp32":
        rows["Precision"] += f"; in fp32: {', '.join(graph['kept_in_fp32']) or 'nothing'}"
    return rows


def _kernels(graph: GraphRecord) -> str:
    """Whose code runs a graph on this machine's CPU."""
    from ..runtimes.ort_custom_ops import choose_kernels

    if not graph.has_functions:
        return "none in this graph: onnxruntime's operators run"
    name, reason = choose_kernels()
    return f"embedport's for {name}" if name else f"none, onnxruntime's operators run: {reason}"


def _openers(shared: Mapping[str, Any]) -> str:
    lines = [", ".join(shared["consumers"])]
    if shared["paths"]:
        lines.append(
            f"{' and '.join(shared['paths'])}, opset {shared['opset']}: "
            f"{', '.join(shared['outputs'])}; {shared['requires']}"
        )
    return "\n".join([*lines, *filter(None, [shared["openvino"]])])


def _part(part: str, sizes: Mapping[str, int]) -> str:
    dtypes = ", ".join(f"{size_words(size)} {dtype}" for dtype, size in sizes.items())
    return f"{part}: {dtypes}"


def _verdict(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return "not validated"
    figures = parity["comparisons"][0]["figures"] if parity["comparisons"] else {}
    words = [
        f"{name} {'NaN' if value is None else format(value, '.7g')}"
        for name, value in figures.items()
    ]
    holds = "holds" if parity["passed"] else "does not hold"
    return "\n".join([f"{holds} ({parity['date']})", *words])


def _checkpoint_facts(source: Source, task: Task | None) -> dict[str, Any]:
    from ..checkpoint.spec import read_spec
    from ..exporters.provenance import adapter_record
    from ..quantize.formats import artifact_bytes
    from ..quantize.stored import find_stored

    spec = read_spec(source, task)
    answers = spec.outputs.answers
    if answers is None and spec.task == "reranker" and spec.score_rows is None:
        answers = ("yes", "no")
    facts = asdict(replace(spec, adapter=None))
    facts |= _token_facts(spec.source.pipeline, spec.inputs, answers)
    del facts["source"]
    record = adapter_record(spec)
    facts["adapter"] = None if record is None else asdict(record)
    stored = find_stored(spec)
    # A checkpoint that only its own library can read has no weights to export.
    exports = spec.quantization is None or stored is not None
    return {
        "checkpoint": source.id,
        "revision": source.revision,
        **facts,
        "parameters": spec.parameters,
        "weights": _weights(spec),
        "artifact_bytes": artifact_bytes(spec) if exports else None,
        "quantized": None if spec.quantization is None else _quantized(spec.quantization),
    }


def _weights(spec: ModelSpec) -> dict[str, Any] | None:
    """The tensors' dtypes and shards; None if they are not on this disk."""
    from ..checkpoint.quantization_config import LibraryQuantization
    from ..checkpoint.tensor_files import read_headers
    from ..quantize.stored import open_weights

    if not any(spec.source.folder.glob("*.safetensors")):
        return None
    if isinstance(spec.quantization, LibraryQuantization):
        tensors = read_headers(spec.source.folder)  # only its library knows the expected names
    else:
        tensors = open_weights(spec).tensors
    files = sorted({info.file for info in tensors.values()})
    return {
        "tensors": len(tensors),
        "dtypes": sorted({info.dtype for info in tensors.values()}),
        "shards": {path.name: path.stat().st_size for path in files},
    }


def _checkpoint_rows(facts: dict[str, Any]) -> dict[str, str]:
    rows = {
        "Checkpoint": _at(facts["checkpoint"], facts["revision"]),
        "Task": facts["task"],
        "Layers": f"{facts['num_layers']}, hidden size {facts['hidden_size']:,}, intermediate "
        f"{facts['intermediate_size']:,}",
        "Heads": f"{facts['num_heads']}, {facts['num_kv_heads']} for keys and values, each of "
        f"{facts['head_dim']}",
        "Vocabulary": f"{facts['vocab_size']:,}, head {'tied' if facts['tied'] else 'not tied'}",
        "Longest text": _lengths(facts),
        **_pipeline_rows(facts),
        "Parameters": f"{facts['parameters']:,}",
        "Weights": _shards(facts["weights"])
        + (f", quantized {facts['quantized']}" if facts["quantized"] else ""),
    }
    if facts["artifact_bytes"] is not None:
        sizes = [f"{size_words(size)} in {name}" for name, size in facts["artifact_bytes"].items()]
        rows["As an artifact"] = f"about {', '.join(sizes)}"
    return rows


def _quantized(quantization: StoredQuantization | LibraryQuantization) -> str:
    """How a checkpoint is quantized, and how it is run or exported here."""
    from ..checkpoint.quantization_config import LibraryQuantization

    lines = [f"by {quantization.method}: {quantization.precision}"]
    place = "here"
    if isinstance(quantization, LibraryQuantization):
        lines[0] += f", which runs it; {'not ' * (quantization.weights is None)}exported"
        place = "in an export"
        if quantization.weights is None:
            return lines[0]
        quantization = quantization.weights
    lines += dict.fromkeys(map(str, quantization.formats))
    lines += ["inputs in any order (act-order)"] * quantization.reorders
    if quantization.rounds_activations:
        lines.append(
            f"weights unpacked: its library rounds activations too, which is not done {place}"
        )
    return "\n".join(lines)


def _shards(weights: Mapping[str, Any] | None) -> str:
    if weights is None:
        return "not on this disk"
    shards = weights["shards"]
    return (
        f"{weights['tensors']} tensors, {', '.join(weights['dtypes'])}, "
        f"{count_words(len(shards), 'file')}, "
        f"{size_words(sum(shards.values()))}"
    )


def _lengths(facts: dict[str, Any]) -> str:
    positions = f"the model has {facts['max_position_embeddings']:,} positions"
    return f"{facts['max_length']:,} tokens; {positions}"


def _token_facts(
    folder: Path, inputs: Inputs, answers: Sequence[int | str | None] | None
) -> dict[str, Any]:
    """The tokens that a tokenizer adds to a text, and a reranker's answer tokens."""
    from ..checkpoint.tokenizer import load_tokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        return {"tokens_added": None, "answers": answers}
    tokenizer = load_tokenizer(path)
    added = [] if inputs.form == "messages" else tokenizer.encode("").tokens
    if answers is not None:
        answers = [tokenizer.id_to_token(x) if isinstance(x, int) else x for x in answers]
    return {"tokens_added": added, "answers": answers}


def _pipeline_rows(facts: Mapping[str, Any]) -> dict[str, str]:
    """The steps before and after the layers, as read from the files."""
    from ..artifact.manifest import AdapterRecord

    inputs, outputs = facts["inputs"], facts["outputs"]
    texts = [FORMS[inputs["form"]]]
    if inputs["form"] == "messages":
        texts[0] += f" ({inputs['message_format']} contents)"
    texts += ["made lower case"] * inputs["lower_case"]
    texts += ["special tokens in them are plain text"] * inputs["split_special_tokens"]
    texts += ["too long ones cut at the beginning"] * (inputs["truncation_side"] == "left")
    rows = {"Texts": "; ".join(texts)}
    if facts["tokens_added"] is not None and inputs["form"] != "messages":
        rows["Tokens added"] = " ".join(facts["tokens_added"]) or "none"
    rows["Prompts"] = _prompts(inputs)
    if "rope" in facts:
        rows["Attention"] = _attention(facts)
    if facts["task"] == "embedding":
        pooled = " and ".join(outputs["pooling"])
        rows["Pooling"] = pooled + ("" if outputs["include_prompt"] else ", without the prompt")
        rows["Dense"] = "\n".join(map(_dense, outputs["steps"])).strip() or "none"
        steps = outputs["steps"]
        rows["Normalization"] = "length 1" if steps and steps[-1] == "normalize" else "none"
        if outputs["truncate"] is not None:
            rows["Normalization"] += f", then cut to {outputs['truncate']:,} values"
        rows["Similarity"] = outputs["similarity"]
    else:
        rows["Head"] = _head(facts)
    adapter = facts["adapter"] if "rope" in facts else facts["source"].get("adapter")
    rows["Adapter"] = "none" if adapter is None else str(AdapterRecord(**adapter))
    return rows


def _attention(facts: Mapping[str, Any]) -> str:
    rope = facts["rope"]
    words = "causal" if facts["causal"] else "to both sides"
    if layers := facts["window_layers"]:
        words += f" within {facts['window']:,} tokens in {len(layers)} of the layers"
    words += ", with biases" if facts["attention_bias"] else ""
    words += f"; rotary embedding with theta {rope['theta']:,.0f}"
    return words if rope["kind"] == "default" else f"{words}, {rope['kind']} x {rope['factor']:g}"


def _dense(step: str | Mapping[str, Any]) -> str:
    if isinstance(step, str):
        return ""
    words = f"{step['path']}: {step['in_features']:,} to {step['out_features']:,}"
    words += " with bias" if step["bias"] else ""
    return f"{words}, {step['activation']}" + (", residual" if step["residual"] else "")


def _head(facts: Mapping[str, Any]) -> str:
    activation = facts["outputs"]["activation"]
    if facts.get("score_rows"):
        return f"a classifier of {facts['score_rows']} labels, {activation}"
    if facts["answers"] is None:
        return f"one row, {activation}"
    yes, no = facts["answers"]
    logits = f"logit of {yes!r}" + ("" if no is None else f" less that of {no!r}")
    return f"{logits}, {activation}"


def _prompts(inputs: Mapping[str, Any]) -> str:
    default = inputs["default_prompt"]
    return (
        "\n".join(
            f"{name}{' (default)' if name == default else ''}: {prompt!r}"
            for name, prompt in inputs["prompts"].items()
        )
        or "none"
    )


def _at(source: str, revision: str | None) -> str:
    return f"{source} @ {revision}" if revision else source
