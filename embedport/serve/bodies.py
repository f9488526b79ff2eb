"""Bodies of requests: JSON to dataclasses, every field checked, unknown fields refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import orjson

from ..texts.prompts import query_prompt
from .errors import RequestError
from .limits import TEXT_CHARACTERS, Limits

# Names that clients give the two sides of a search: Cohere's, Jina's, Voyage's and NVIDIA's.
SIDES = {
    "query": "query",
    "search_query": "query",
    "retrieval.query": "query",
    "document": "document",
    "passage": "document",
    "search_document": "document",
    "retrieval.passage": "document",
}
TRUNCATE = {False: False, True: True, "NONE": False, "END": True}


@dataclass(frozen=True)
class EmbeddingBody:
    """The body of /v1/embeddings.

    Attributes:
        texts: The texts.
        model: The model's name; None for the only embedding model.
        prompt: As for `Embedder.encode`.
        dimensions: Number of leading values to keep; None keeps all.
        as_base64: Whether vectors are base64 of little-endian float32.
        truncate: Whether texts beyond the model's length are cut.
    """

    texts: list[str]
    model: str | None
    prompt: str | None
    dimensions: int | None
    as_base64: bool
    truncate: bool


@dataclass(frozen=True)
class RerankBody:
    """The body of a request for reranking.

    Attributes:
        query: The query.
        documents: The documents.
        model: The model's name; None for the only reranker.
        instruction: As for `Reranker.score`.
        top_n: How many results to return; None for all.
        with_documents: Whether results contain the documents.
        truncate: Whether pairs beyond the model's length are cut.
    """

    query: str
    documents: list[str]
    model: str | None
    instruction: str | None
    top_n: int | None
    with_documents: bool
    truncate: bool


def read_object(body: bytes) -> dict[str, Any]:
    """Parse a body.

    Raises:
        RequestError: It is not a JSON object.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body should be JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise RequestError(400, f"the body should be a JSON object, found {_kind(value)}")
    # A field that is null is one that is not there.
    return {name: field for name, field in value.items() if field is not None}


def read_embedding(body: dict[str, Any], limits: Limits) -> EmbeddingBody:
    """Read the body of /v1/embeddings.

    Raises:
        RequestError: A field is missing, unknown, of another type, or beyond a limit.
    """
    known = ("input", "model", "encoding_format", "dimensions", "user")
    prompts = ("input_type", "task", "prompt_name", "instruction")
    _check_names(body, (*known, *prompts, "truncate"))
    texts = _required(body, "input")
    texts = _check_texts([texts] if isinstance(texts, str) else texts, "input", limits)
    _check_repeated(body, prompts, len(texts), limits)
    encoding = _choice(body, "encoding_format", {"float": False, "base64": True}, "float")
    return EmbeddingBody(
        texts=texts,
        model=_string(body, "model"),
        prompt=_prompt(body, prompts),
        dimensions=_positive(body, "dimensions"),
        as_base64=encoding,
        truncate=_choice(body, "truncate", TRUNCATE, False),
    )


def read_rerank(body: dict[str, Any], limits: Limits) -> RerankBody:
    """Read the body of /v1/rerank and /v2/rerank, as Cohere and Jina have it.

    Raises:
        RequestError: A field is missing, unknown, of another type, or beyond a limit.
    """
    known = ("query", "documents", "model", "top_n", "return_documents", "instruction", "truncate")
    _check_names(body, known)
    documents = _required(body, "documents")
    if isinstance(documents, list):  # Cohere's first version and Jina's also have objects
        documents = [
            one.get("text") if isinstance(one, dict) and len(one) == 1 else one for one in documents
        ]
    documents = _check_texts(documents, "documents", limits)
    return RerankBody(
        query=_query(body, len(documents), limits),
        documents=documents,
        model=_string(body, "model"),
        instruction=_string(body, "instruction"),
        top_n=_positive(body, "top_n"),
        with_documents=_choice(body, "return_documents", {True: True, False: False}, False),
        truncate=_choice(body, "truncate", TRUNCATE, False),
    )


def read_tei_rerank(body: dict[str, Any], limits: Limits) -> RerankBody:
    """Read the body of /rerank, as text-embeddings-inference has it.

    Raises:
        RequestError: A field is missing, unknown, of another type, or beyond a limit; or raw scores
            are asked for, which the graph does not give.
    """
    known = ("query", "texts", "raw_scores", "return_text", "truncate", "truncation_direction")
    _check_names(body, known)
    if _choice(body, "raw_scores", {True: True, False: False}, False):
        raise RequestError(
            422, "raw_scores should be false: scores are the model's own", param="raw_scores"
        )
    if body.get("truncation_direction", "right") not in ("right", "Right"):
        raise RequestError(
            422, "truncation_direction should be 'right'", param="truncation_direction"
        )
    documents = _check_texts(_required(body, "texts"), "texts", limits)
    return RerankBody(
        query=_query(body, len(documents), limits),
        documents=documents,
        model=None,
        instruction=None,
        top_n=None,
        with_documents=_choice(body, "return_text", {True: True, False: False}, False),
        truncate=_choice(body, "truncate", TRUNCATE, False),
    )


def _check_texts(value: Any, name: str, limits: Limits) -> list[str]:
    if not isinstance(value, list):
        raise RequestError(400, f"{name} should be a list of strings", param=name)
    if not value:
        raise RequestError(400, f"{name} should hold at least one text", param=name)
    first = value[0][0] if isinstance(value[0], list) and value[0] else value[0]
    if type(first) is int:
        raise RequestError(
            400,
            f"{name} should be a list of strings, found token ids, which another tokenizer made; "
            "in LangChain set check_embedding_ctx_length=False",
            param=name,
        )
    if len(value) > limits.texts:
        raise RequestError(
            422,
            f"{name} should hold {limits.texts:,} texts at most, found {len(value):,}",
            param=name,
        )
    for i, text in enumerate(value):
        if not isinstance(text, str):
            raise RequestError(
                400, f"{name}[{i}] should be a string, found {_kind(text)}", param=name
            )
        _check_size(f"{name}[{i}]", text, name)
    return value


def _check_size(place: str, text: str, param: str, most: int = TEXT_CHARACTERS) -> None:
    if len(text) > most:
        raise RequestError(
            422,
            f"{place} should have {most:,} characters at most, found {len(text):,}",
            param=param,
        )


def _check_repeated(
    body: dict[str, Any], names: Collection[str], texts: int, limits: Limits
) -> None:
    """Check what is read again before each text: all together no more than a body may hold."""
    most = min(TEXT_CHARACTERS, limits.body // texts)
    for name in names:
        place = f"{name}, which is put before each of {texts:,} texts,"
        _check_size(place, _string(body, name) or "", name, most)


def _query(body: dict[str, Any], documents: int, limits: Limits) -> str:
    _check_repeated(body, ("query", "instruction"), documents, limits)
    return _required(body, "query")


def _prompt(body: dict[str, Any], fields: Collection[str]) -> str | None:
    """The prompt: at most one of the fields that name one."""
    given = [name for name in fields if name in body]
    if len(given) > 1:
        raise RequestError(400, f"give one of {', '.join(given)}", param=given[1])
    if not given:
        return None
    (name,) = given
    value = _string(body, name)
    assert value is not None
    if name == "instruction":
        return query_prompt(value)
    if name == "prompt_name":
        return value
    if value not in SIDES:
        raise RequestError(
            400, f"{name} should be one of {', '.join(SIDES)}, found {value[:80]!r}", param=name
        )
    return SIDES[value]


def _check_names(body: dict[str, Any], known: Collection[str]) -> None:
    for name in body:
        if name not in known:
            raise RequestError(
                400, f"unknown field {name[:80]!r}; known are {', '.join(known)}", param=name[:80]
            )


def _required(body: dict[str, Any], name: str) -> Any:
    if name not in body:
        raise RequestError(400, f"{name} is missing", param=name)
    return body[name]


def _string(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(400, f"{name} should be a string, found {_kind(value)}", param=name)
    return value


def _positive(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise RequestError(400, f"{name} should be a number from 1 on", param=name)
    return value


def _choice(body: dict[str, Any], name: str, choices: dict[Any, bool], default: Any) -> bool:
    value = body.get(name, default)
    # 1 and 0 equal true and false, and are not they.
    if isinstance(value, str | bool) and value in choices:
        return choices[value]
    shown = " or ".join(str(orjson.dumps(choice), "utf-8") for choice in choices)
    raise RequestError(400, f"{name} should be {shown}", param=name)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value"}
    return names.get(type(value), "null" if value is None else "a number")
