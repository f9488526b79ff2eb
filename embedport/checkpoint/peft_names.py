"""Which modules an adapter's configuration names, as PEFT 0.21 matches them.

Names are those of the model that the adapter was trained on. A pattern comes from a file that is
not trusted, so it is limited to what matches in bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .keys import shown

ALL_LINEAR = "all-linear"
# Limits against patterns that take forever to match: characters of a pattern, its repetitions, and
# names or patterns under one key.
LONGEST_PATTERN, MOST_REPEATS, MOST_NAMES = 2000, 5, 2000
# Groups of a pattern; and the repetitions that this module adds around one.
MOST_GROUPS, OWN_REPEATS = 12, 2


@dataclass(frozen=True)
class ConfiguredNames:
    """The names and patterns of an adapter_config.json.

    Attributes:
        path: The file, for errors.
        values: Its contents, of checked types.
    """

    path: Path
    values: Mapping[str, Any]

    def saves(self, module: str) -> bool:
        """Whether modules_to_save names a module or one around it, as `_set_trainable` does."""
        parts = module.split(".")
        modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
        names = tuple(self.values.get("modules_to_save") or ())
        return any(outer.endswith(names) for outer in modules)

    def targets(self, module: str) -> bool:
        """Whether a module gets a low-rank pair.

        As in PEFT's `check_target_module_exists` and `_maybe_include_all_linear_layers`.

        Raises:
            CheckpointError: A pattern exceeds the limits, or is not a regular expression.
        """
        values = self.values
        excluded, targets = values.get("exclude_modules"), values["target_modules"]
        if excluded and self._names("exclude_modules", excluded, module):
            return False
        for name in values.get("modules_to_save") or ():
            if self._match("modules_to_save", rf"(^|.*\.){name}($|\..*)", module):
                return False
        if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
            # PEFT puts a classifier's score into modules_to_save.
            return module != "lm_head" and not module.endswith("embed_tokens")
        if not self._names("target_modules", targets, module):
            return False
        layers = values.get("layers_to_transform")
        if isinstance(targets, str) or layers is None or layers == [] or module in targets:
            return True
        return self._layer_of(module) in ([layers] if isinstance(layers, int) else layers)

    def by_pattern(self, key: str, module: str, default: Any) -> Any:
        """A module's value in rank_pattern or alpha_pattern, as in PEFT's `get_pattern_key`.

        Raises:
            CheckpointError: A pattern exceeds the limits, or is not a regular expression.
        """
        for pattern, value in (self.values.get(key) or {}).items():
            if self._match(key, rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def _layer_of(self, module: str) -> int | None:
        """The number of a module's layer, found by layers_pattern; None if it is in no layer."""
        patterns = self.values.get("layers_pattern")
        prefixes = [r".*?\.[^.]*"]
        if patterns:
            patterns = [patterns] if isinstance(patterns, str) else patterns
            prefixes = [rf"(?:^|.*?\.){pattern}" for pattern in patterns]
        for prefix in prefixes:
            if number := self._match("layers_pattern", rf"{prefix}\.(?P<idx>\d+)\.", module):
                return int(number["idx"])
        return None

    def _names(self, key: str, names: str | Iterable[str], module: str) -> bool:
        """Whether a pattern matches a module's full name, or a listed name is its end."""
        if isinstance(names, str):
            return self._match(key, names, module, whole=True) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _match(
        self, key: str, pattern: str, module: str, *, whole: bool = False
    ) -> re.Match[str] | None:
        """Match a module's name from its beginning, or as a whole."""
        try:
            compiled = _compile(pattern)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: {key} {error}: {shown(pattern)}") from error
        return compiled.fullmatch(module) if whole else compiled.match(module)


@lru_cache(maxsize=4 * MOST_NAMES)
def _compile(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that matches in bounded time: few repetitions, none of a group.

    Raises:
        ValueError: It exceeds the limits, or is not a regular expression.
    """
    repeats = len(re.findall(r"[*+{]|[^*+}(]\?", pattern))
    if (
        len(pattern) > LONGEST_PATTERN
        or repeats > MOST_REPEATS + OWN_REPEATS
        or pattern.count("(") > MOST_GROUPS
        or re.search(r"\)[*+{]", pattern)
    ):
        raise ValueError(
            f"should have patterns of {LONGEST_PATTERN} characters, {MOST_GROUPS} groups and "
            f"{MOST_REPEATS} repetitions at most, and none of a group"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is not a regular expression ({error})") from error
