"""The settings that a checkpoint declares beside its weights, as its own library read them.

Validated texts use few of a folder's prompts and of its tokenizer's merges, and none of its
similarity function; in 4 bits they do not tell one base of the rotary embedding from another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.pipeline import ROLES
from ..checkpoint.spec import ModelSpec
from ..runtimes import ModelInfo
from .report import Gate, unchecked

GATE = "settings that differ"
# Characters of a value that the gate shows.
LONGEST = 200
# Of a reference; JSON values, since a recorded reference holds them.
Settings = Mapping[str, Any]
# Groups of settings that files recorded by earlier versions lack.
LAYERS, TOKENIZER = "layers", "tokenizer"


def layer_settings(spec: ModelSpec) -> Settings:
    """The layers' settings in config.json, as a spec reads them.

    Args:
        spec: The checkpoint's spec.

    Returns:
        JSON values by name.
    """
    return {
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads,
        "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim,
        "intermediate_size": spec.intermediate_size,
        "rms_norm_eps": spec.rms_norm_eps,
        "rope_parameters": spec.rope.to_parameters(),
        "is_causal": spec.causal,
        "sliding_window": spec.window,
        "layers with a window": list(spec.window_layers),
        "attention_bias": spec.attention_bias,
    }


def tokenizer_settings(tokenizer: Any) -> Settings:
    """A tokenizer's vocabulary and rules, which decide the ids of any text.

    Args:
        tokenizer: A `tokenizers.Tokenizer`, as a library made it of a folder.

    Returns:
        JSON values by name; of the ids and the merges, sha256 digests.
    """
    values = json.loads(tokenizer.to_str())
    model = values["model"]
    ids = sorted(tokenizer.get_vocab(with_added_tokens=True).items())
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", ())]
    return {
        "ids of tokens": _digest(ids),
        "merges": _digest(merges),
        "normalizer": _parts(values["normalizer"]),
        "pre_tokenizer": _parts(values["pre_tokenizer"]),
    }


def _parts(rule: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a rule, of sequences within sequences too."""
    if rule is None:
        return []
    nested = rule.get("normalizers", rule.get("pretokenizers"))
    if nested is None:
        return [{key: value for key, value in rule.items() if key != "trim_offsets"}]
    return [part for each in nested for part in _parts(each)]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def settings_gate(info: ModelInfo, tokenizer: Any, settings: Settings | None) -> Gate:
    """The artifact declares what the reference's library read.

    A smaller width (`dim`) and another limit of tokens (`max_length`) are an exporter's options,
    and are no differences.

    Args:
        info: The artifact, or the checkpoint.
        tokenizer: Its `tokenizers.Tokenizer`.
        settings: The reference's; None if they are not known.
    """
    if settings is None:
        return unchecked(GATE, "this recorded reference has no settings: record it again")
    missing = [group for group in (LAYERS, TOKENIZER) if group not in settings]
    basis = f"without {' and '.join(missing)}: record the reference again" if missing else ""
    if info.checkpoint is None:  # of a graph they are the file's, which `companions` compares
        settings = {name: value for name, value in settings.items() if name != LAYERS}
    found, wanted = dict(_named(_declared(info, tokenizer))), dict(_named(settings))
    differences = [
        f"{name}: found {_shown(found.get(name))}, expected {_shown(expected)}"
        for name, expected in wanted.items()
        if found.get(name) != expected
    ]
    if "prompts" in settings:
        differences += [
            f"{name}: found {_shown(found[name])}, expected none"
            for name in sorted(found.keys() - wanted.keys())
            if name.startswith("prompt ")
        ]
    positions = settings["positions"]
    if info.max_position_embeddings > positions:
        differences.append(
            f"positions: found {info.max_position_embeddings:,}, expected at most {positions:,}"
        )
    return Gate(GATE, len(differences), "≤", 0, "; ".join(differences), basis)


def _declared(info: ModelInfo, tokenizer: Any) -> Settings:
    return {
        "prompts": info.inputs.prompts,
        "default_prompt": info.inputs.default_prompt,
        "similarity": info.outputs.similarity,
        "truncate_dim": info.outputs.truncate,
        LAYERS: layer_settings(info.checkpoint) if info.checkpoint else {},
        TOKENIZER: tokenizer_settings(tokenizer),
    }


def _named(settings: Settings) -> Iterator[tuple[str, Any]]:
    """(name, value); each prompt by itself, and an empty one of a role as if there were none."""
    for name, text in settings.get("prompts", {}).items():
        if text or name not in ROLES:
            yield f"prompt {name!r}", text
    for key in ("default_prompt", "similarity", "truncate_dim"):
        if key in settings:
            yield key.replace("_", " "), settings[key]
    for group in (LAYERS, TOKENIZER):
        yield from settings.get(group, {}).items()


def _shown(value: Any) -> str:
    # A space at a prompt's end counts, so it is shown.
    return "none" if value is None else repr(value)[:LONGEST]
