"""Chat templates, rendered as transformers renders them: in jinja2's sandbox.

A template comes from the checkpoint and is not trusted: it gets plain values only, and cannot reach
files, modules or the clock. https://huggingface.co/docs/transformers/en/chat_templating
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, InputError
from ..files import read_small
from ..strict_json import read_optional_json
from .pipeline import MessageFormat
from .tokens import TOKENIZER_CONFIG, special_tokens

TEMPLATE = "chat_template.jinja"
FURTHER = "additional_chat_templates"
# Template text by which sentence-transformers detects that a message's content is a list of parts.
PARTS = ("content[0]", ".type", "'type'", '"type"', "item.type", "message.content[")
# (query, document) pairs: the second changes the query of the first, the third its document.
PROBES = (("alpha", "bravo"), ("charlie", "bravo"), ("alpha", "foxtrot"))

Message = Mapping[str, Any]


class ChatTemplate:
    """A folder's chat template.

    Args:
        folder: The checkpoint's or artifact's folder.
        message_format: Whether a message's content is a string or a list of parts.
        values: Further variables of the template.

    Raises:
        CheckpointError: The folder has no template, or it is not valid.
    """

    def __init__(
        self, folder: Path, message_format: MessageFormat, values: Mapping[str, Any]
    ) -> None:
        self.path, text, _ = read_template(folder)
        self._structured = message_format == "structured"
        self._values = {**special_tokens(folder)[0], **values}
        self._template = _compile(text, self.path)
        self._text = text

    def text(self, text: str, prompt: str | None) -> list[Message]:
        """The messages of a text: the prompt as a system message, then a user message."""
        return self._messages([("user", text)], prompt)

    def pair(self, query: str, document: str, prompt: str | None) -> list[Message]:
        """The messages of a pair: the prompt as a system message, then "query" and "document"."""
        return self._messages([("query", query), ("document", document)], prompt)

    def _messages(self, contents: Sequence[tuple[str, str]], prompt: str | None) -> list[Message]:
        if prompt:
            contents = [("system", prompt), *contents]
        return [
            {
                "role": role,
                "content": [{"type": "text", "text": text}] if self._structured else text,
            }
            for role, text in contents
        ]

    def render(self, messages: Sequence[Message]) -> str:
        """Render messages to text.

        Raises:
            InputError: The template rejects them.
        """
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                documents=None,
                **{"add_generation_prompt": False, **self._values},
            )
        except Exception as error:  # whatever its expressions raise: 1 // 0, range(10**9)
            roles = ", ".join(str(message["role"]) for message in messages)
            raise InputError(
                f"{self.path}: the chat template rejects messages with the roles {roles}: {error}"
            ) from error

    def reads_task(self) -> bool:
        """Whether the template reads `task`, and the folder does not set it.

        sentence-transformers then sets it, in encode_query and encode_document only.
        """
        from jinja2 import meta

        names = meta.find_undeclared_variables(self._template.environment.parse(self._text))
        return "task" in names and "task" not in self._values

    def carries_pairs(self) -> bool:
        """Whether the rendered text depends on both texts of a pair."""
        try:
            plain, *changed = (self.render(self.pair(*pair, prompt=None)) for pair in PROBES)
        except InputError:
            return False
        return plain not in changed


def read_template(folder: Path) -> tuple[Path, str, bool]:
    """Read a folder's chat template: (its file, its text, whether the folder has several).

    chat_template.jinja takes precedence over tokenizer_config.json; of several templates the one
    named "default" is read.

    Raises:
        CheckpointError: There is none.
    """
    path = folder / TEMPLATE
    if path.exists():
        try:
            text = read_small(path).decode("utf-8")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        return path, text, any((folder / FURTHER).glob("*.jinja"))
    path = folder / TOKENIZER_CONFIG
    template = read_optional_json(path).get("chat_template")
    several = isinstance(template, list)
    if several:
        entries = [entry for entry in template if isinstance(entry, dict)]
        texts = [entry.get("template") for entry in entries if entry.get("name") == "default"]
        template = texts[-1] if texts else None
    if not isinstance(template, str) or not template:
        raise CheckpointError(
            f"{folder} has no chat template ({TEMPLATE}, or chat_template in {TOKENIZER_CONFIG})"
        )
    return path, template, several


def has_template(folder: Path) -> bool:
    """Whether a folder has a chat template."""
    settings = folder / TOKENIZER_CONFIG
    return (folder / TEMPLATE).exists() or bool(read_optional_json(settings).get("chat_template"))


def infer_format(folder: Path) -> MessageFormat:
    """The message format that sentence-transformers infers if none is declared."""
    _, text, several = read_template(folder)
    return "structured" if several or any(sign in text for sign in PARTS) else "flat"


def _compile(text: str, path: Path) -> Any:
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if "strftime_now" in text:
        raise CheckpointError(f"{path}: a chat template that reads the date is not supported")

    class Generation(Extension):
        """The {% generation %} block, which marks an assistant's text and renders it unchanged."""

        tags = {"generation"}  # noqa: RUF012 (jinja's way)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, *, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    named: dict[str, Any] = environment.globals
    named["raise_exception"] = raise_exception
    try:
        return environment.from_string(text)
    except Exception as error:  # blocks nested too deep are a SyntaxError of Python's
        raise CheckpointError(f"{path}: the chat template is not valid: {error}") from error
