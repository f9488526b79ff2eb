"""The library names options as Python does; here they are spelled as flags.

A name is in backticks, is followed by its value as in device='cpu', or begins a message that says
what it should be.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

NAME = re.compile(r"`([a-z_]+(?:=False)?)`|\b([a-z_]+)='(\w+)'|^([a-z_]+)(?= should )")
# Options whose keyword in Python is another word.
KEYWORDS = {"output": "outputs", "profile": "profiles", "form": "format"}


def with_flags(message: str, command: Any) -> str:
    """Spell a message's options as flags: `group_size` becomes --group-size.

    Args:
        message: A message of the library.
        command: The click command, whose subcommands have the options. One that another command
            shares, such as `form`, is that of the command which runs.
    """
    if NAME.search(message) is None:
        return message
    flags = dict(_flags(command)) | dict(_flags(_running(command)))

    def spell(match: re.Match[str]) -> str:
        flag = flags.get(match[1] or match[2] or match[4])
        return match[0] if flag is None else flag if match[2] is None else f"{flag} {match[3]}"

    return NAME.sub(spell, message)


def _running(command: Any) -> Any:
    """The subcommand that the command line names."""
    for word in sys.argv[1:]:
        if word in getattr(command, "commands", {}):
            command = command.commands[word]
        elif not word.startswith("-"):
            break
    return command


class FlagFormatter(logging.Formatter):
    """Formats log records with options spelled as flags."""

    def __init__(self, format: str, command: Any) -> None:
        super().__init__(format)
        self._command = command

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        return with_flags(super().format(record), self._command)


def _flags(command: Any) -> Iterator[tuple[str, str]]:
    """Each option's keyword in Python and its flag, of a command and its subcommands."""
    subcommands: Mapping[str, Any] = getattr(command, "commands", {})
    for subcommand in subcommands.values():
        yield from _flags(subcommand)
    for option in command.params:
        if not any(flag.startswith("--") for flag in option.opts):
            continue
        flag = next(flag for flag in option.opts if flag.startswith("--"))
        for name in {option.name, KEYWORDS.get(option.name, option.name)}:
            yield name, flag
            if option.secondary_opts:
                yield f"{name}=False", option.secondary_opts[0]
            elif flag.startswith("--no-"):
                yield f"{name.removeprefix('no_')}=False", flag
