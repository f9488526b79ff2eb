"""Interleaved rounds of a workload, so that a slow moment of the machine hits every runner."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from ..errors import VerificationError
from ..validation.measures import cosines
from .runners import Runner, Worker
from .workloads import Workload, write_rows

# Batch sizes that a runner may choose from; our runtime forms batches by itself.
BATCHES = (1, 4, 8, 16, 32)
# Number of rows on which a runner's best batch size is chosen.
TRIED_ROWS = 32
# Rounds of runners with wider arithmetic than the first runner: they take many times as long.
FEW_ROUNDS = 1


@dataclass(frozen=True)
class Result:
    """One runner's result on one workload.

    Attributes:
        batch_rows: Its best batch size of `BATCHES`; None if it forms batches by itself.
        tokens_per_second: Median over its rounds; padding is not counted.
        from_to: Slowest and fastest round, in tokens per second.
        ratio: First runner's speed divided by this runner's: median over rounds run side by side.
        ratio_from_to: Smallest and largest such ratio.
        rounds: Number of rounds it took part in.
        minimum_cosine: Smallest cosine of its vectors and the first runner's, in the first round;
            None for scores.
        largest_difference: Largest difference from the first runner's scores; None for vectors.
        peak_bytes: Its largest resident set so far; 0 if unknown.
    """

    batch_rows: int | None
    tokens_per_second: float
    from_to: tuple[float, float]
    ratio: float
    ratio_from_to: tuple[float, float]
    rounds: int
    minimum_cosine: float | None
    largest_difference: float | None
    peak_bytes: int


class Benchmark:
    """A context manager that loads all runners and runs workloads on them in turn.

    Attributes:
        runners: The runners.
        threads: Number of threads that each runner was told to use.
        failures: Workload's name to name of each runner that failed, to its last output.

    Args:
        runners: The runners; the others are compared with the first.
        threads: Number of threads that each runner was told to use.
        say: Called with a description of each stage.

    Raises:
        VerificationError: A runner uses another number of threads than it was told, or ends.
    """

    def __init__(self, runners: Sequence[Runner], threads: int, say: Callable[[str], None]) -> None:
        self.runners = tuple(runners)
        self.threads = threads
        self._say = say
        self._workers: dict[str, Worker] = {}
        self.failures: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Benchmark:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for runner in self.runners:
                self._say(f"{runner.name}: loading")
                self._workers[runner.name] = Worker(runner.command)
                used = self._workers[runner.name].ready["threads"]
                if used != self.threads:
                    raise VerificationError(
                        f"{runner.name} was told to use {self.threads} threads, and its library "
                        f"reports {used}: the comparison would be unfair"
                    )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, workload: Workload, rounds: int) -> dict[str, Result]:
        """Run one workload on all runners.

        Args:
            workload: The workload.
            rounds: Number of rounds; runners wider than the first have `FEW_ROUNDS`.

        Returns:
            Name of each runner to its result. A runner whose process ends has no result: `failures`
            says why, and it is restarted for the next workload.

        Raises:
            VerificationError: The first runner's process ends.
        """
        first = self.runners[0]
        rounds_of = {
            runner.name: rounds if runner.bits <= first.bits else min(rounds, FEW_ROUNDS)
            for runner in self.runners
        }
        failed: set[str] = set()
        batches: dict[str, int | None] = {}
        for runner in self.runners:
            with self._survived(runner, workload, failed):
                batches[runner.name] = self._choose_batch(runner, workload)
        speeds: dict[str, list[float]] = {runner.name: [] for runner in self.runners}
        peaks: dict[str, int] = {}
        vectors: dict[str, np.ndarray] = {}
        for number in range(rounds):
            rows = workload.part(number)
            tokens = sum(map(len, rows)) * workload.repeats
            running = [runner for runner in self.runners if number < rounds_of[runner.name]]
            # The order alternates, because a runner finds the caches as the one before left them.
            for runner in running if number % 2 == 0 else running[::-1]:
                name = runner.name
                if name in failed:
                    continue
                self._say(f"{workload.name}, round {number + 1} of {rounds}: {name}")
                with self._survived(runner, workload, failed):
                    answers = [
                        self._ask(name, rows, batches[name] or 0, "vectors.npy")
                        for _ in range(workload.repeats)
                    ]
                    speeds[name].append(tokens / sum(seconds for seconds, _, _ in answers))
                    _, peaks[name], answer = answers[-1]
                    vectors.setdefault(name, answer)
        return {
            name: _result(
                batches[name],
                speeds[first.name],
                side_speeds,
                (vectors[first.name], vectors[name]),
                peaks[name],
            )
            for name, side_speeds in speeds.items()
            if name not in failed
        }

    @contextlib.contextmanager
    def _survived(self, runner: Runner, workload: Workload, failed: set[str]) -> Generator[None]:
        """Drop a runner from this workload if its process ends, for example out of memory."""
        try:
            yield
        except VerificationError as error:
            if runner == self.runners[0]:
                raise
            failed.add(runner.name)
            self.failures.setdefault(workload.name, {})[runner.name] = str(error)
            self._workers[runner.name] = Worker(runner.command)

    def _choose_batch(self, runner: Runner, workload: Workload) -> int | None:
        """Choose the runner's fastest batch size, on rows of all lengths; this also warms it up."""
        rows = workload.part(0)
        sample = sorted(rows, key=len)[:: -(-len(rows) // TRIED_ROWS)]
        self._say(f"{workload.name}: {runner.name} warms up")
        if runner.has_batches:
            self._ask(runner.name, sample, 0, "tried.npy")
            return None
        sizes = [size for size in BATCHES if size <= len(sample)]
        if len(sizes) == 1:
            self._ask(runner.name, sample, sizes[0], "tried.npy")
            return sizes[0]
        # The first call allocates memory, so it is not timed.
        self._ask(runner.name, sample[:1], 1, "tried.npy")
        return min(sizes, key=lambda size: self._ask(runner.name, sample, size, "tried.npy")[0])

    def _ask(
        self, name: str, rows: Sequence[np.ndarray], batch_rows: int, file: str
    ) -> tuple[float, int, np.ndarray]:
        rows_path, vectors_path = self._folder / "rows.npz", self._folder / file
        write_rows(rows_path, rows)
        reply = self._workers[name].ask(
            {"rows": str(rows_path), "batch_rows": batch_rows, "vectors": str(vectors_path)}
        )
        return reply["seconds"], reply["peak_bytes"], np.load(vectors_path)


def _result(
    batch_rows: int | None,
    first: list[float],
    speeds: list[float],
    vectors: tuple[np.ndarray, np.ndarray],
    peak: int,
) -> Result:
    ratios = [
        first_speed / own_speed for first_speed, own_speed in zip(first, speeds, strict=False)
    ]
    reference, answers = vectors
    cosine = difference = None
    # A peer gives vectors for pairs, before the head: there is nothing to compare with scores.
    if reference.ndim == answers.ndim == 2:
        cosine = float(cosines(answers, reference).min())
    elif reference.ndim == answers.ndim:
        difference = float(np.abs(answers - reference).max())
    return Result(
        batch_rows,
        round(median(speeds), 1),
        (round(min(speeds), 1), round(max(speeds), 1)),
        round(median(ratios), 3),
        (round(min(ratios), 3), round(max(ratios), 3)),
        len(speeds),
        cosine,
        difference,
        peak,
    )


def start_cold(runner: Runner, workload: Workload, starts: int) -> list[float]:
    """Seconds from the start of a new process to its first answer; files are in the page cache.

    Args:
        runner: The runner.
        workload: The workload; its first part is requested.
        starts: Number of processes to time, one after another; an extra one warms up first.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        rows, vectors = Path(folder) / "rows.npz", Path(folder) / "vectors.npy"
        write_rows(rows, workload.part(0))
        request = {"rows": str(rows), "batch_rows": 1, "vectors": str(vectors)}
        for _ in range(starts + 1):
            start = time.perf_counter()
            worker = Worker(runner.command)
            worker.ask(request)
            seconds.append(time.perf_counter() - start)
            worker.close()
    return [round(duration, 3) for duration in seconds[1:]]
