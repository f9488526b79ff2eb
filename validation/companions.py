"""The files beside an artifact's weights, as other software reads them.

embedport reads an artifact's settings from its manifest. sentence-transformers, transformers, vLLM
and others read config.json, modules.json, the poolings' and the tokenizer's settings and the chat
template: these have to say the same, and no file may stand beside them that they would read too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..artifact.folder import Artifact
from ..checkpoint.chat import TEMPLATE, infer_format
from ..checkpoint.hub import Source
from ..checkpoint.keys import shown
from ..checkpoint.modules import MODULES
from ..checkpoint.pipeline import Inputs, Outputs
from ..checkpoint.spec import CAUSAL_LM, ModelSpec, read_spec
from ..checkpoint.tokens import read_length, special_tokens
from ..errors import CheckpointError, InputError
from ..files import MANIFEST
from ..runtimes import ModelInfo
from ..strict_json import read_json, read_optional_json
from ..texts.prompts import RerankerTokenizer, find_answers, load_tokenizer
from ..texts.samples import Pair
from .report import Gate
from .settings import LAYERS, Settings, layer_settings

GATE = "files that differ"
# Files that other software opens if they are there: weights, graphs, settings, tokenizers.
OPENED = (
    *("**/*.onnx", "openvino/*", "*.gguf"),
    *("model*.safetensors*", "pytorch_model*", "adapter_*", "*.index.json"),
    *("config.json", "*/config.json", "modules.json", "sentence_*_config.json"),
    *("config_sentence_transformers.json", "quant*_config.json", "generation_config.json"),
    *("*processor_config.json", "vocab.json", "merges.txt", "*.jinja", "chat_template.json"),
    "additional_chat_templates/*",
)
# The file that holds a setting.
TOKENIZER, TRANSFORMER = "tokenizer_config.json", "sentence_bert_config.json"
SETTINGS, POOLING = "config_sentence_transformers.json", "1_Pooling/config.json"
FILES = {
    "prompts": SETTINGS,
    "default_prompt": SETTINGS,
    "similarity": SETTINGS,
    "truncate": SETTINGS,
    "pooling": POOLING,
    "include_prompt": POOLING,
    "steps": MODULES,
    "form": TRANSFORMER,
    "message_format": TRANSFORMER,
    "template_values": TRANSFORMER,
    "lower_case": TRANSFORMER,
    "split_special_tokens": TOKENIZER,
    "truncation_side": TOKENIZER,
    "activation": "config.json",
}
OF_VECTORS = ("pooling", "include_prompt", "steps", "truncate", "similarity")
OF_TEXTS = ("prompts", "default_prompt", "lower_case", "split_special_tokens", "truncation_side")
OF_CHATS = ("form", "message_format", "template_values")
QUANTIZATION = "quantize_config.json"
# Of a pair that is rendered besides those that are validated, of which all may have the default.
INSTRUCTION = "Find the statute"


def files_gate(info: ModelInfo, settings: Settings, pairs: Sequence[Pair]) -> list[Gate]:
    """The folder's files say what the manifest and the reference say, and no file was added.

    Args:
        info: The artifact; a checkpoint without a manifest gets no gate.
        settings: The reference's; those that are not known are not compared.
        pairs: For a reranker, the pairs that are validated.
    """
    if info.artifact is None:
        return []
    differences = [f"{name}: it was added" for name in _added(info.artifact)]
    try:
        spec = info.checkpoint or read_spec(Source(info.name, None, info.folder), info.task)
        differences += _differences(info, spec, settings, pairs)
    except (CheckpointError, InputError) as error:
        differences.append(str(error))
    return [Gate(GATE, len(differences), "≤", 0, "; ".join(differences))]


def _added(artifact: Artifact) -> list[str]:
    """Files that other software would open, and that the manifest does not list."""
    folder, own = artifact.folder, artifact.manifest.files
    found = {path.relative_to(folder).as_posix() for name in OPENED for path in folder.glob(name)}
    return sorted(name for name in found - own.keys() if (folder / name).is_file())


def _differences(
    info: ModelInfo,
    spec: ModelSpec,
    settings: Settings,
    pairs: Sequence[Pair],
) -> Iterator[str]:
    artifact = info.artifact
    assert artifact is not None
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        yield from _unlike("config.json", key, getattr(spec, key), getattr(info, key))
    if info.checkpoint is None and LAYERS in settings:  # a checkpoint's are its settings
        for key, value in layer_settings(spec).items():
            expected = settings[LAYERS].get(key)
            yield from _unlike("config.json", key, value, expected, "the reference")
    # An artifact may cut texts earlier than the files say: the option `max_length`.
    own, limit = artifact.manifest.max_length, settings.get("max_length")
    # Readers of a graph that do not know sentence-transformers take the tokenizer's own.
    plain = read_length(info.folder, spec.max_position_embeddings, None)
    found = plain if artifact.manifest.graph is not None and plain < own else spec.max_length
    if found not in (own, limit) and (limit is not None or found < own):
        expected = own if limit is None else limit
        yield (
            f"{TRANSFORMER} or {TOKENIZER}: tokens of a text: found {found:,}, expected "
            f"{expected:,}"
        )
    if info.task == "embedding":
        if not (artifact.folder / MODULES).exists():
            yield f"{MODULES}: it is missing: sentence-transformers would choose its own modules"
        yield from _records(spec.inputs, info.inputs, (*OF_TEXTS, *OF_CHATS))
        yield from _records(spec.outputs, info.outputs, OF_VECTORS)
    else:
        yield from _records(spec.inputs, info.inputs, OF_TEXTS)
        yield from _records(spec.outputs, info.outputs, ("activation",))
        yield from _pair_differences(info, spec, pairs)
    yield from _notes(info, spec)


def _records(
    found: Inputs | Outputs, expected: Inputs | Outputs, keys: Sequence[str]
) -> Iterator[str]:
    for key in keys:
        yield from _unlike(FILES[key], key, getattr(found, key), getattr(expected, key))


def _unlike(file: str, key: str, found: Any, expected: Any, place: str = MANIFEST) -> Iterator[str]:
    if found != expected:
        yield f"{file}: {key}: found {shown(found)}, expected {shown(expected)} as in {place}"


def _pair_differences(info: ModelInfo, spec: ModelSpec, pairs: Sequence[Pair]) -> Iterator[str]:
    """The files, from which other software makes its tokens, give each pair embedport's."""
    inputs = spec.inputs
    file = "tokenizer.json" if info.inputs.form == "text" else TEMPLATE
    if inputs.form == "instruct":  # transformers' own form has no template; servers have one
        inputs = replace(inputs, form="messages", message_format=infer_format(info.folder))
    if info.checkpoint is None:  # other software skips nothing; the graph does, if it has to
        inputs = replace(inputs, skipped_token=info.inputs.skipped_token)
    own, theirs = (
        RerankerTokenizer(info.folder / "tokenizer.json", info.max_length, form)
        for form in (info.inputs, inputs)
    )
    asked = [replace(pair, instruction=INSTRUCTION) for pair in pairs[:1]]
    for i, pair in enumerate([*pairs, *asked]):
        row, other = (
            tokenizer.encode([(pair.query, pair.document)], pair.instruction).ids[0].tolist()
            for tokenizer in (own, theirs)
        )
        # A row that is cut is cut in another place.
        if len(row) < info.max_length and row != other:
            which = f"pair {i}" if i < len(pairs) else "a pair with its own instruction"
            yield f"{file}: {which} has other tokens in it than in embedport"
            return


def _notes(info: ModelInfo, spec: ModelSpec) -> Iterator[str]:
    """Notes of a quantized checkpoint that servers read and transformers does not."""
    config = read_json(info.folder / "config.json")
    if (info.folder / QUANTIZATION).exists():
        expected = config.get("quantization_config")
        if read_json(info.folder / QUANTIZATION) != expected:
            yield f"{QUANTIZATION}: it should be the same as quantization_config in config.json"
    tokens = config.get("classifier_from_token")
    if tokens is not None:
        yes, no = find_answers(spec)
        tokenizer = load_tokenizer(info.folder / "tokenizer.json")
        expected = [tokenizer.id_to_token(id_) for id_ in (no, yes) if id_ is not None]
        yield from _unlike("config.json", "classifier_from_token", tokens, expected)
    if info.checkpoint is not None and spec.task == "reranker" and spec.score_rows is None:
        # transformers reads a stored lm_head whatever this says; vLLM takes the table instead.
        tied = config.get("tie_word_embeddings", False)
        yield from _unlike("config.json", "tie_word_embeddings", tied, spec.tied, "the weights")
        # For another one CrossEncoder makes a head of random numbers.
        names = config.get("architectures")
        yield from _unlike("config.json", "architectures", names, [CAUSAL_LM], "the weights")
    settings = read_optional_json(info.folder / TOKENIZER)
    if spec.score_rows is not None and settings.get("padding_side", "right") == "right":
        # transformers looks for the last token that is not this one.
        padding = special_tokens(info.folder)[0].get("pad_token", "")
        id_ = load_tokenizer(info.folder / "tokenizer.json").token_to_id(padding)
        yield from _unlike(
            "config.json", "pad_token_id", config.get("pad_token_id"), id_, TOKENIZER
        )
