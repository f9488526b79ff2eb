"""Refusals, in the form that the clients of each API read."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

# TEI's names of the kinds of errors; the others are "validation".
TEI_TYPES = {429: "overloaded", 500: "backend", 503: "unhealthy"}


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: The HTTP status.
        message: What is wrong, and what to do.
        param: The field of the body that is wrong.
        code: A name for programs, such as "model_not_found".
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def stopping() -> RequestError:
    """The refusal of what a server that stops will not answer."""
    return RequestError(503, "the server is stopping", code="stopping")


Form = Callable[[RequestError], dict[str, object]]


def openai_form(error: RequestError) -> dict[str, object]:
    """OpenAI's: {"error": {"message", "type", "param", "code"}}."""
    kind = "invalid_request_error"
    if error.status == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    elif error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        kind = "server_error"
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": error.param,
            "code": error.code,
        }
    }


def rerank_form(error: RequestError) -> dict[str, object]:
    """Cohere's "message" and Jina's "detail"."""
    return {"message": error.message, "detail": error.message}


def tei_form(error: RequestError) -> dict[str, object]:
    """TEI's: {"error", "error_type"}."""
    return {"error": error.message, "error_type": TEI_TYPES.get(error.status, "validation")}
