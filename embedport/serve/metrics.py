"""The server's counters, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        disable_created_metrics()  # a second series for each, with its first time
        self._registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "embedport", "registry": self._registry}
        self._requests = Counter("requests", "Answered requests", ["path", "status"], **options)
        self._seconds = Histogram(
            "request_seconds",
            "Time from a request's first byte to its answer",
            ["path"],
            buckets=SECONDS,
            **options,
        )
        self._texts = Counter("texts", "Texts that ran", ["model"], **options)
        self._tokens = Counter("tokens", "Tokens that ran, without padding", ["model"], **options)
        self._dropped = Counter("dropped_texts", "Texts whose client left", ["model"], **options)
        self._batch_seconds = Histogram(
            "batch_seconds", "Time of a batch in the model", ["model"], buckets=SECONDS, **options
        )
        self._batch_texts = Histogram(
            "batch_texts", "Texts of a batch", ["model"], buckets=SIZES, **options
        )
        self._queue = Gauge("queued_texts", "Texts that wait for their batch", **options)

    def watch_queue(self, count: Callable[[], int]) -> None:
        """Report what `count` gives as the number of waiting texts."""
        self._queue.set_function(count)

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_batch(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """Count a batch that ran."""
        self._texts.labels(model).inc(texts)
        self._tokens.labels(model).inc(tokens)
        self._batch_seconds.labels(model).observe(seconds)
        self._batch_texts.labels(model).observe(texts)

    def count_dropped(self, model: str, texts: int) -> None:
        """Count texts whose client left before they ran."""
        self._dropped.labels(model).inc(texts)

    def render(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)
