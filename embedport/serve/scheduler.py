"""The queue of all requests' rows, and the one thread that runs the models.

Requests take turns: each batch has rows of the requests that wait, in rotation, so a query does not
wait for a large request that came before it. Rows that run together have similar lengths, and the
first request's first row is always among them, so each row's turn comes.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .errors import stopping
from .metrics import Metrics
from .models import Lane, Rows

logger = logging.getLogger(__name__)

# Maximum rows that are looked at for a batch.
WINDOW_ROWS = 1024

Place = tuple["Job", int]


class Job:
    """A request's rows on their way through the model.

    Attributes:
        rows: The rows.
        results: float32 [rows, width], filled as batches are done.
        future: Done when all results are there.
        waiting: The rows that are not taken yet, longest first.
    """

    def __init__(self, rows: Rows, loop: asyncio.AbstractEventLoop) -> None:
        self.rows = rows
        self.results = np.empty((len(rows.ids), *rows.lane.model.width), np.float32)
        self.future: asyncio.Future[np.ndarray] = loop.create_future()
        self.waiting = sorted(range(len(rows.ids)), key=lambda row: -len(rows.ids[row]))
        self.missing = len(rows.ids)


class Scheduler:
    """Runs jobs in a thread of its own.

    Args:
        loop: The event loop of the jobs' futures.
        metrics: Counts batches and queued texts.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, metrics: Metrics) -> None:
        self._loop, self._metrics = loop, metrics
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        metrics.watch_queue(self.count_waiting)

    def start(self, prepare: Callable[[], None]) -> asyncio.Future[None]:
        """Start the thread.

        Args:
            prepare: What the thread does first: load the models and warm them up.

        Returns:
            A future that is done when `prepare` is, or holds its exception.
        """
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._work, args=(prepare, ready), name="models", daemon=True
        )
        self._thread.start()
        return ready

    def submit(self, rows: Rows) -> Job:
        """Queue rows; the job's future gets the results.

        Raises:
            RequestError: 503, the scheduler is closing.
        """
        job = Job(rows, self._loop)
        with self._changed:
            if self._closing:
                raise stopping()
            self._jobs.append(job)
            self._changed.notify()
        return job

    def cancel(self, job: Job) -> int:
        """Take a job's waiting rows out of the queue; rows that already run are dropped after it.

        Returns:
            The number of rows that did not run.
        """
        with self._changed:
            dropped = len(job.waiting)
            job.waiting = []
            if job in self._jobs:
                self._jobs.remove(job)
        return dropped

    def close(self) -> None:
        """End the thread when its current batch is done, and wait for it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def count_waiting(self) -> int:
        """Number of texts that wait for their batch."""
        with self._changed:
            return sum(len(job.waiting) for job in self._jobs)

    def _work(self, prepare: Callable[[], None], ready: asyncio.Future[None]) -> None:
        try:
            prepare()
        except BaseException as error:
            self._tell(_fail, ready, error)
            return
        self._tell(_finish, [(ready, None)])
        while (batch := self._next()) is not None:
            self._run(batch)

    def _next(self) -> list[Place] | None:
        """Wait for rows, and take a batch of them; None when the scheduler closes."""
        with self._changed:
            while not self._jobs and not self._closing:
                self._changed.wait()
            return None if self._closing else self._take()

    def _take(self) -> list[Place]:
        lane = self._jobs[0].rows.lane
        window = _look_ahead([job for job in self._jobs if job.rows.lane == lane], lane)
        batch = [window[i] for i in lane.model.pick([len(job.rows.ids[i]) for job, i in window])]
        taken: dict[Job, set[int]] = {}
        for job, row in batch:
            taken.setdefault(job, set()).add(row)
        for job, rows in taken.items():
            job.waiting = [row for row in job.waiting if row not in rows]
            if not job.waiting:
                self._jobs.remove(job)
        # The next batch begins with the next request.
        if self._jobs and self._jobs[0] in taken:
            self._jobs.rotate(-1)
        return batch

    def _run(self, batch: Sequence[Place]) -> None:
        """Run a batch. If it fails, each of its jobs is run alone, so that only the cause fails."""
        lane = batch[0][0].rows.lane
        start = time.perf_counter()
        try:
            results = lane.model.run(
                [job.rows.ids[row] for job, row in batch],
                [job.rows.key for job, _ in batch],
                lane,
            )
        except Exception as error:
            jobs = list(dict.fromkeys(job for job, _ in batch))
            if len(jobs) > 1:
                for one in jobs:
                    self._run([place for place in batch if place[0] is one])
                return
            logger.error("a batch of %d rows failed: %s", len(batch), error)
            self.cancel(jobs[0])
            self._tell(_fail, jobs[0].future, error)
            return
        self._metrics.count_batch(
            lane.model.name,
            len(batch),
            sum(len(job.rows.ids[row]) for job, row in batch),
            time.perf_counter() - start,
        )
        finished: list[tuple[asyncio.Future[np.ndarray], np.ndarray]] = []
        for (job, row), result in zip(batch, results, strict=True):
            job.results[row] = result
            job.missing -= 1
            if job.missing == 0:
                finished.append((job.future, job.results))
        if finished:
            self._tell(_finish, finished)

    def _tell(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function on the event loop's thread, unless the loop is closed already."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _look_ahead(jobs: Sequence[Job], lane: Lane) -> list[Place]:
    """The next waiting rows of a lane's jobs, in rotation, within the model's window."""
    window: list[Place] = []
    tokens = 0
    for place in _in_rotation(jobs, lane.model.chunk):
        window.append(place)
        tokens += len(place[0].rows.ids[place[1]])
        if tokens >= lane.model.window or len(window) == WINDOW_ROWS:
            break
    return window


def _in_rotation(jobs: Sequence[Job], chunk: int) -> Iterator[Place]:
    """Rows of each job in turn, `chunk` at a time."""
    start = 0
    while jobs:
        for job in jobs:
            for row in job.waiting[start : start + chunk]:
                yield job, row
        start += chunk
        jobs = [job for job in jobs if len(job.waiting) > start]


def _finish(results: Sequence[tuple[asyncio.Future[Any], object]]) -> None:
    for future, result in results:
        if not future.done():
            future.set_result(result)


def _fail(future: asyncio.Future[Any], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
