"""Limits of requests, and the count of the texts and bytes that the server holds."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass

from .errors import RequestError

# Maximum characters of a text: a model with 32,768 positions reads about 200,000.
TEXT_CHARACTERS = 1_000_000
# All bodies held at once, as a multiple of the largest one.
BODIES_AT_ONCE = 16
# Seconds in which a request's body must arrive.
BODY_SECONDS = 60


@dataclass(frozen=True)
class Limits:
    """Limits of a server.

    Attributes:
        texts: Maximum texts (or documents) of a request.
        body: Maximum bytes of a request's body.
        queue: Maximum texts of all requests that are being answered or wait.
    """

    texts: int = 2048
    body: int = 16 << 20
    queue: int = 8192


class Gate:
    """Counts the texts and bytes that the server holds, and refuses more than the limits.

    It belongs to the event loop's thread.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.texts = 0
        self.bytes = 0

    @contextlib.contextmanager
    def admit_texts(self, count: int) -> Generator[None]:
        """Hold `count` texts.

        Raises:
            RequestError: 429, the queue is full.
        """
        if self.texts + count > self.limits.queue:
            raise RequestError(
                429,
                f"the queue is full: {self.texts:,} of {self.limits.queue:,} texts wait, and this "
                f"request has {count:,}; try again later",
                code="queue_full",
            )
        self.texts += count
        try:
            yield
        finally:
            self.texts -= count

    @contextlib.contextmanager
    def admit_bytes(self, declared: int | None) -> Generator[None]:
        """Hold a body of its declared size, or of the largest size if it declares none.

        Raises:
            RequestError: 413, the body is too large; 429, too many bodies are held.
        """
        most = self.limits.body
        if declared is not None and declared > most:
            raise too_large(most)
        size = most if declared is None else declared
        if self.bytes + size > BODIES_AT_ONCE * most:
            raise RequestError(
                429, "too many large requests at once; try again later", code="queue_full"
            )
        self.bytes += size
        try:
            yield
        finally:
            self.bytes -= size


def too_large(most: int) -> RequestError:
    """The refusal of a body of more than `most` bytes."""
    return RequestError(
        413, f"the body should have {most:,} bytes at most; send the texts in several requests"
    )
