"""Answers in the shapes that clients of each API read."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence

import numpy as np

from ..errors import EmbedportError, InputError
from ..runtimes.vectors import shorten
from .bodies import EmbeddingBody, RerankBody
from .errors import RequestError
from .models import ServedEmbedder, ServedModel, ServedReranker


def embedding_answer(
    model: ServedEmbedder, body: EmbeddingBody, vectors: np.ndarray, tokens: int
) -> dict[str, object]:
    """OpenAI's answer of /v1/embeddings.

    Args:
        model: The model.
        body: The request.
        vectors: float32 [texts, dim].
        tokens: Number of tokens, prompts and special tokens included.
    """
    check_finite(vectors, model, "input")
    if body.dimensions is not None:
        unit_length = model.info.outputs.unit_length
        vectors = shorten(vectors, body.dimensions, unit_length=unit_length)
    vectors = np.ascontiguousarray(vectors, "<f4")
    values: Sequence[object] = list(vectors)
    if body.as_base64:
        values = [base64.b64encode(vector).decode("ascii") for vector in vectors]
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": value}
            for i, value in enumerate(values)
        ],
        "model": model.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def rerank_answer(
    model: ServedReranker, body: RerankBody, scores: np.ndarray, tokens: int
) -> dict[str, object]:
    """The answer of /v1/rerank and /v2/rerank, with the fields of both Cohere's and Jina's.

    Args:
        model: The model.
        body: The request.
        scores: float32 [documents].
        tokens: Number of tokens, template included.
    """
    check_finite(scores, model, "document")
    results = []
    for i in _order(scores)[: body.top_n]:
        result: dict[str, object] = {"index": i, "relevance_score": float(scores[i])}
        if body.with_documents:
            result["document"] = {"text": body.documents[i]}
        results.append(result)
    return {
        "id": str(uuid.uuid4()),
        "object": "list",
        "model": model.name,
        "results": results,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "meta": {"api_version": {"version": "2"}, "tokens": {"input_tokens": tokens}},
    }


def tei_answer(
    model: ServedReranker, body: RerankBody, scores: np.ndarray
) -> list[dict[str, object]]:
    """TEI's answer of /rerank.

    Args:
        model: The model.
        body: The request.
        scores: float32 [texts].
    """
    check_finite(scores, model, "text")
    return [
        {
            "index": i,
            "score": float(scores[i]),
            **({"text": body.documents[i]} if body.with_documents else {}),
        }
        for i in _order(scores)
    ]


def model_answer(model: ServedModel, created: int) -> dict[str, object]:
    """OpenAI's description of a model, with what a client of embeddings needs to know.

    Args:
        model: The model.
        created: The server's start, in seconds since 1970.
    """
    answer: dict[str, object] = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "embedport",
        "task": model.info.task,
        "precision": model.precision,
        "device": model.device,
        "max_length": model.max_length,
        "prompts": sorted(model.info.prompts),
    }
    if isinstance(model, ServedEmbedder):
        answer["dimensions"] = model.info.dim
    return answer


def check_finite(values: np.ndarray, model: ServedModel, noun: str) -> None:
    """Refuse to answer with NaN or infinity, which JSON does not have.

    Raises:
        RequestError: A value is not finite.
    """
    rows = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not rows.all():
        raise RequestError(
            500,
            f"{noun}[{int(np.argmin(rows))}] gave NaN or infinity in {model.precision}: export "
            f"{model.name} in another precision, or calibrate it with texts like this one",
            code="not_finite",
        )


def as_refusal(error: Exception) -> RequestError:
    """An exception of the models as a refusal: our own say what is wrong, others are bugs."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, EmbedportError):  # a GPU that fails is no fault of the request
        return RequestError(400 if isinstance(error, InputError) else 500, str(error))
    return RequestError(500, f"this is a bug: {type(error).__name__}; the server's log says more")


def _order(scores: np.ndarray) -> list[int]:
    """Indices by score, best first; equal scores keep their order."""
    return np.argsort(-scores, kind="stable").tolist()
