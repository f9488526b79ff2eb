"""The HTTP application: what each path does."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from .answers import (
    as_refusal,
    embedding_answer,
    model_answer,
    rerank_answer,
    tei_answer,
)
from .bodies import read_embedding, read_object, read_rerank, read_tei_rerank
from .errors import Form, RequestError, openai_form, rerank_form, stopping, tei_form
from .limits import BODY_SECONDS, Gate, Limits, too_large
from .metrics import CONTENT_TYPE, Metrics
from .models import Rows, ServedEmbedder, ServedModel, ServedReranker
from .scheduler import Scheduler

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=ServedModel)
Handler = Callable[[Request], Awaitable[Response]]
PATHS = (
    "POST /v1/embeddings",
    "POST /v1/rerank",
    "POST /v2/rerank",
    "POST /rerank",
    "GET /v1/models",
    "GET /metrics",
    "GET /health",
)
# nginx's number for a client that left; nobody reads it but the metrics.
CLIENT_LEFT = 499


class Server:
    """The state that the paths share.

    Args:
        load: Loads the models; called in the thread that runs them.
        limits: The limits.
        api_key: The key that requests must have; None for no key.
        failed: Called with the exception if loading fails.
    """

    def __init__(
        self,
        load: Callable[[], Mapping[str, ServedModel]],
        limits: Limits,
        api_key: str | None,
        failed: Callable[[BaseException], None],
    ) -> None:
        self._load, self._limits, self._failed = load, limits, failed
        self._key = None if api_key is None else api_key.encode()
        self._gate, self._metrics = Gate(limits), Metrics()
        self._models: Mapping[str, ServedModel] = {}
        self._state, self._created = "starting", int(time.time())
        self._tokenizing = ThreadPoolExecutor(1, "tokenizer")
        self._scheduler: Scheduler | None = None

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncGenerator[None]:
        """Load the models while the port is open already, and end the threads at the end."""
        del app
        self._scheduler = Scheduler(asyncio.get_running_loop(), self._metrics)
        ready = self._scheduler.start(self._prepare)
        ready.add_done_callback(self._started)
        try:
            yield
        finally:
            self._state = "stopping"
            await asyncio.to_thread(self._scheduler.close)
            self._tokenizing.shutdown(cancel_futures=True)

    def _prepare(self) -> None:
        models = self._load()
        for model in models.values():
            start = time.perf_counter()
            model.warm_up()
            logger.info("%s: warmed up in %.1f s", model.name, time.perf_counter() - start)
        self._models = models

    def _started(self, ready: asyncio.Future[None]) -> None:
        if ready.cancelled():
            return
        if (error := ready.exception()) is not None:
            self._failed(error)
        else:
            self._state = "ready"

    def routes(self) -> list[Route]:
        """All paths."""
        return [
            self._route("/v1/embeddings", "POST", self.embeddings, openai_form),
            self._route("/v1/rerank", "POST", self.rerank, rerank_form),
            self._route("/v2/rerank", "POST", self.rerank, rerank_form),
            self._route("/rerank", "POST", self.plain_rerank, tei_form),
            self._route("/v1/models", "GET", self.models, openai_form),
            self._route("/v1/models/{name:path}", "GET", self.model, openai_form),
            self._route("/metrics", "GET", self.metrics, openai_form),
            self._route("/health", "GET", self.health, openai_form, public=True),
        ]

    def _route(
        self, path: str, method: str, handler: Handler, form: Form, *, public: bool = False
    ) -> Route:
        """A path whose refusals have the form of its API, and whose requests are counted."""

        async def answer(request: Request) -> Response:
            start = time.perf_counter()
            response = Response(status_code=CLIENT_LEFT)
            try:
                if not public:
                    self._authorize(request)
                response = await handler(request)
            except ClientDisconnect:
                pass
            except asyncio.CancelledError:  # the server stops, and its grace is over
                response = refuse(stopping(), form)
            except Exception as error:
                refusal = as_refusal(error)
                if refusal is not error and refusal.status == 500:
                    logger.exception("%s failed", path)
                response = refuse(refusal, form)
            finally:
                self._metrics.count_request(path, response.status_code, time.perf_counter() - start)
            return response

        return Route(path, answer, methods=[method])

    async def embeddings(self, request: Request) -> Response:
        """OpenAI's /v1/embeddings."""
        async with self._body(request) as content:
            values = read_object(content)
            body = read_embedding(values, self._limits)
            model = self._find(body.model, ServedEmbedder)
            if "prompt_name" in values:
                model.check_prompt_name(body.prompt)
            if body.dimensions is not None and body.dimensions > model.embedder.dim:
                raise RequestError(
                    400,
                    f"dimensions should be from 1 to {model.embedder.dim}, found {body.dimensions}",
                    param="dimensions",
                )
            tokenize = partial(model.tokenize, body.texts, body.prompt, truncate=body.truncate)
            vectors, tokens = await self._compute(request, len(body.texts), tokenize)
            return to_json(embedding_answer(model, body, vectors, tokens))

    async def rerank(self, request: Request) -> Response:
        """Cohere's and Jina's /v1/rerank, and Cohere's /v2/rerank."""
        async with self._body(request) as content:
            return await self._rerank(request, read_object(content))

    async def plain_rerank(self, request: Request) -> Response:
        """/rerank: TEI's, whose documents are "texts", or the same as /v1/rerank."""
        async with self._body(request) as content:
            values = read_object(content)
            if "documents" in values:
                return await self._rerank(request, values)
            body = read_tei_rerank(values, self._limits)
            model = self._find(body.model, ServedReranker)
            tokenize = partial(
                model.tokenize, body.query, body.documents, None, truncate=body.truncate
            )
            scores, _ = await self._compute(request, len(body.documents), tokenize)
            return to_json(tei_answer(model, body, scores))

    async def _rerank(self, request: Request, values: dict[str, object]) -> Response:
        body = read_rerank(values, self._limits)
        model = self._find(body.model, ServedReranker)
        tokenize = partial(
            model.tokenize, body.query, body.documents, body.instruction, truncate=body.truncate
        )
        scores, tokens = await self._compute(request, len(body.documents), tokenize)
        return to_json(rerank_answer(model, body, scores, tokens))

    async def models(self, request: Request) -> Response:
        """OpenAI's /v1/models."""
        del request
        self._check_ready()
        models = [model_answer(model, self._created) for model in self._models.values()]
        return to_json({"object": "list", "data": models})

    async def model(self, request: Request) -> Response:
        """OpenAI's /v1/models/NAME."""
        self._check_ready()
        return to_json(
            model_answer(self._find(request.path_params["name"], ServedModel), self._created)
        )

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        del request
        return Response(self._metrics.render(), media_type=CONTENT_TYPE)

    async def health(self, request: Request) -> Response:
        """Whether requests are answered: 200 after the warm-up, 503 before it and at the end."""
        del request
        return to_json({"status": self._state}, 200 if self._state == "ready" else 503)

    def _authorize(self, request: Request) -> None:
        if self._key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        # Compared in constant time, as bytes: a header may hold any character.
        if not hmac.compare_digest(key.strip().encode("latin-1"), self._key) or (
            scheme.lower() != "bearer"
        ):
            raise RequestError(
                401,
                "a key is needed: send the header `Authorization: Bearer KEY`",
                code="invalid_api_key",
            )

    def _check_ready(self) -> None:
        if self._state != "ready":
            raise RequestError(503, f"the server is {self._state}; see /health", code=self._state)

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncGenerator[bytes]:
        """Read a body within the limits; its bytes count as held until the answer is made."""
        self._check_ready()
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise RequestError(
                415, f"the body should not be compressed, found Content-Encoding {encoding[:50]!r}"
            )
        declared = request.headers.get("content-length")
        with self._gate.admit_bytes(int(declared) if declared is not None else None):
            content = bytearray()
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for chunk in request.stream():
                        content += chunk
                        if len(content) > self._limits.body:
                            raise too_large(self._limits.body)
            except TimeoutError as error:
                raise RequestError(
                    408, f"the body did not arrive within {BODY_SECONDS} s"
                ) from error
            yield bytes(content)

    def _find(self, name: str | None, kind: type[Model]) -> Model:
        """The model of a name, or without one the only model of its kind."""
        fitting = {model.name: model for model in self._models.values() if isinstance(model, kind)}
        if name is None and len(fitting) == 1:
            return next(iter(fitting.values()))
        if name in fitting:
            return fitting[name]
        listed = ", ".join(fitting) or "none of this kind"
        said = "model is missing" if name is None else f"there is no model {name[:200]!r} here"
        if name in self._models:
            said = f"{name!r} is no {'embedder' if kind is ServedEmbedder else 'reranker'}"
        raise RequestError(
            400 if name is None else 404,
            f"{said}; served are: {listed}",
            param="model",
            code="model_not_found",
        )

    async def _compute(
        self, request: Request, texts: int, tokenize: Callable[[], Rows]
    ) -> tuple[np.ndarray, int]:
        """Tokenize, queue, and wait; if the client leaves, its texts leave the queue.

        Args:
            request: The request, whose body was read.
            texts: Number of its texts.
            tokenize: Makes its rows; called in the tokenizer's thread.

        Returns:
            The results in the order of the texts, and the number of their tokens.

        Raises:
            ClientDisconnect: The client left.
        """
        scheduler = self._scheduler
        assert scheduler is not None
        with self._gate.admit_texts(texts):
            loop = asyncio.get_running_loop()
            rows = await loop.run_in_executor(self._tokenizing, tokenize)
            job = scheduler.submit(rows)
            left = asyncio.ensure_future(_wait_until_left(request))
            try:
                await asyncio.wait({job.future, left}, return_when=asyncio.FIRST_COMPLETED)
                if not job.future.done():
                    raise ClientDisconnect
                return job.future.result(), rows.tokens
            finally:
                left.cancel()
                if not job.future.done():
                    job.future.cancel()
                    self._metrics.count_dropped(rows.lane.model.name, scheduler.cancel(job))


def create_app(
    load: Callable[[], Mapping[str, ServedModel]],
    limits: Limits = Limits(),  # noqa: B008  (frozen)
    *,
    api_key: str | None = None,
    failed: Callable[[BaseException], None] = lambda error: None,
) -> Starlette:
    """Make the ASGI application.

    Args:
        load: Loads the models, by the names that requests give; called once, in the thread that
            runs them.
        limits: The limits.
        api_key: The key that requests must have, but those to /health; None for no key.
        failed: Called with the exception if loading fails; the application then stays "starting".
    """
    server = Server(load, limits, api_key, failed)
    return Starlette(
        routes=server.routes(),
        lifespan=server.lifespan,
        exception_handlers={HTTPException: _no_such_path},
    )


def to_json(value: object, status: int = 200) -> Response:
    """A response; numpy arrays are lists in it."""
    content = orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
    return Response(content, status, media_type="application/json")


def refuse(error: RequestError, form: Form) -> Response:
    """A refusal in an API's form."""
    response = to_json(form(error), error.status)
    if error.status in (429, 503):
        response.headers["retry-after"] = "1"
    if error.status == 408:  # what may still come of the body is not read
        response.headers["connection"] = "close"
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _wait_until_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _no_such_path(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}; there are {', '.join(PATHS)}"
    response = to_json(openai_form(RequestError(error.status_code, message)), error.status_code)
    response.headers.update(error.headers or {})
    return response
