"""The settings that a checkpoint declares beside its weights, as its own library read them.

Validated texts use few of a folder's prompts, and none of its similarity function.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..checkpoint.pipeline import ROLES
from ..runtimes import ModelInfo
from .report import Gate

GATE = "settings that differ"
# Characters of a value that the gate shows.
LONGEST = 200
# Of a reference; JSON values, since a recorded reference holds them.
Settings = Mapping[str, Any]


def settings_gate(info: ModelInfo, settings: Settings | None) -> Gate:
    """The artifact declares what the reference's library read.

    A smaller width (`dim`) and another limit of tokens (`max_length`) are an exporter's options,
    and are no differences.

    Args:
        info: The artifact, or the checkpoint.
        settings: The reference's; None if they are not known.
    """
    if settings is None:
        reason = "this recorded reference has no settings: record it again"
        return Gate(GATE, None, "≤", 0, basis=f"not checked: {reason}")
    found = _declared(info)
    differences = [
        f"{name}: found {_shown(found.get(name))}, expected {_shown(expected)}"
        for name, expected in _flat(settings).items()
        if found.get(name) != expected
    ]
    if "prompts" in settings:
        extra = found.keys() - _flat(settings).keys()
        differences += [
            f"{name}: found {_shown(found[name])}, expected none"
            for name in sorted(extra)
            if name.startswith("prompt ")
        ]
    positions = settings["positions"]
    if info.max_position_embeddings > positions:
        differences.append(
            f"positions: found {info.max_position_embeddings:,}, expected at most {positions:,}"
        )
    return Gate(GATE, len(differences), "≤", 0, "; ".join(differences))


def _declared(info: ModelInfo) -> dict[str, Any]:
    return _flat(
        {
            "prompts": info.inputs.prompts,
            "default_prompt": info.inputs.default_prompt,
            "similarity": info.outputs.similarity,
            "truncate_dim": info.outputs.truncate,
        }
    )


def _flat(settings: Settings) -> dict[str, Any]:
    """Name to value; each prompt by itself, and an empty one of a role as if there were none."""
    return dict(_named(settings))


def _named(settings: Settings) -> Iterator[tuple[str, Any]]:
    for name, text in settings.get("prompts", {}).items():
        if text or name not in ROLES:
            yield f"prompt {name!r}", text
    for key in ("default_prompt", "similarity", "truncate_dim"):
        if key in settings:
            yield key.replace("_", " "), settings[key]


def _shown(value: Any) -> str:
    # A space at a prompt's end counts, so it is shown.
    return "none" if value is None else repr(value)[:LONGEST]
