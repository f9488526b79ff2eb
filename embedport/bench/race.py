"""Rounds of work, interleaved: what slows the machine down slows every side."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from ..errors import VerificationError
from ..validation.measures import cosines
from .sides import Side, Worker
from .work import Work, write_rows

# Rows of a batch that a side may choose from; ours chooses by itself.
BATCHES = (1, 4, 8, 16, 32)
# Of a work's part, the rows on which that choice is made.
TRIED_ROWS = 32
# Rounds of sides whose arithmetic is wider than the first's: they take many times as long.
FEW_ROUNDS = 1


@dataclass(frozen=True)
class Result:
    """What one side did with one work.

    Attributes:
        batch_rows: Its best of `BATCHES`; None where it chooses by itself.
        tokens_per_second: Median of its rounds; padding is not counted.
        from_to: Of its rounds.
        ratio: Median of the first side's speed by this one's, of rounds side by side.
        ratio_from_to: Of those rounds.
        rounds: How many it took part in.
        minimum_cosine: Of its vectors to the first side's, in the first round; None for scores.
        largest_difference: Of its scores to the first side's; None for vectors.
        peak_bytes: Its largest resident set until then.
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


class Race:
    """Sides that are loaded, asked in turn; a context manager.

    Attributes:
        sides: The sides.
        threads: What each was told to work with.
        failures: Name of each work to the sides that did not survive it, and what they said.

    Args:
        sides: The first is what the others are measured by.
        threads: What each was told to work with.
        say: Told what is being done.

    Raises:
        VerificationError: A library works with another number of threads than it was told, or a
            side ends.
    """

    def __init__(self, sides: Sequence[Side], threads: int, say: Callable[[str], None]) -> None:
        self.sides = tuple(sides)
        self.threads = threads
        self._say = say
        self._workers: dict[str, Worker] = {}
        self.failures: dict[str, dict[str, str]] = {}

    def __enter__(self) -> Race:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            self._folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            for side in self.sides:
                self._say(f"{side.name}: loading")
                self._workers[side.name] = Worker(side.command)
                used = self._workers[side.name].ready["threads"]
                if used != self.threads:
                    raise VerificationError(
                        f"{side.name} was told to work with {self.threads} threads, and its "
                        f"library reports {used}: the sides would not be equal"
                    )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _close(self) -> None:
        for worker in self._workers.values():
            worker.close()

    def run(self, work: Work, rounds: int) -> dict[str, Result]:
        """Race over one work.

        Args:
            work: The work.
            rounds: Of sides whose arithmetic is as wide as the first's, or narrower.

        Returns:
            Name of each side to its result. A side whose process ends has none; `failures` says
            why, and it is started again for the next work.

        Raises:
            VerificationError: The first side ends.
        """
        first = self.sides[0]
        rounds_of = {
            side.name: rounds if side.bits <= first.bits else min(rounds, FEW_ROUNDS)
            for side in self.sides
        }
        failed: set[str] = set()
        batches: dict[str, int | None] = {}
        for side in self.sides:
            with self._survived(side, work, failed):
                batches[side.name] = self._choose_batch(side, work)
        speeds: dict[str, list[float]] = {side.name: [] for side in self.sides}
        peaks: dict[str, int] = {}
        vectors: dict[str, np.ndarray] = {}
        for number in range(rounds):
            rows = work.part(number)
            tokens = sum(map(len, rows)) * work.repeats
            running = [side for side in self.sides if number < rounds_of[side.name]]
            # Who goes first changes: it would run on what the other one left in the caches.
            for side in running if number % 2 == 0 else running[::-1]:
                name = side.name
                if name in failed:
                    continue
                self._say(f"{work.name}, round {number + 1} of {rounds}: {name}")
                with self._survived(side, work, failed):
                    answers = [
                        self._ask(name, rows, batches[name] or 0, "vectors.npy")
                        for _ in range(work.repeats)
                    ]
                    speeds[name].append(tokens / sum(seconds for seconds, _, _ in answers))
                    _, peaks[name], found = answers[-1]
                    vectors.setdefault(name, found)
        return {
            name: _result(
                batches[name],
                speeds[first.name],
                each,
                (vectors[first.name], vectors[name]),
                peaks[name],
            )
            for name, each in speeds.items()
            if name not in failed
        }

    @contextlib.contextmanager
    def _survived(self, side: Side, work: Work, failed: set[str]) -> Generator[None]:
        """Leave a side whose process ends out of the work, such as one that takes all memory."""
        try:
            yield
        except VerificationError as error:
            if side == self.sides[0]:
                raise
            failed.add(side.name)
            self.failures.setdefault(work.name, {})[side.name] = str(error)
            self._workers[side.name] = Worker(side.command)

    def _choose_batch(self, side: Side, work: Work) -> int | None:
        """The side's fastest batch, on rows of all lengths; warms it up too."""
        rows = work.part(0)
        tried = sorted(rows, key=len)[:: -(-len(rows) // TRIED_ROWS)]
        self._say(f"{work.name}: {side.name} warms up")
        if side.has_batches:
            self._ask(side.name, tried, 0, "tried.npy")
            return None
        sizes = [size for size in BATCHES if size <= len(tried)]
        if len(sizes) == 1:
            self._ask(side.name, tried, sizes[0], "tried.npy")
            return sizes[0]
        # The first call, in which memory is found, is no one's fault.
        self._ask(side.name, tried[:1], 1, "tried.npy")
        return min(sizes, key=lambda size: self._ask(side.name, tried, size, "tried.npy")[0])

    def _ask(
        self, name: str, rows: Sequence[np.ndarray], batch_rows: int, file: str
    ) -> tuple[float, int, np.ndarray]:
        path, answer = self._folder / "rows.npz", self._folder / file
        write_rows(path, rows)
        done = self._workers[name].ask(
            {"rows": str(path), "batch_rows": batch_rows, "vectors": str(answer)}
        )
        return done["seconds"], done["peak_bytes"], np.load(answer)


def _result(
    batch_rows: int | None,
    first: list[float],
    speeds: list[float],
    vectors: tuple[np.ndarray, np.ndarray],
    peak: int,
) -> Result:
    ratios = [mine / theirs for mine, theirs in zip(first, speeds, strict=False)]
    reference, found = vectors
    cosine = difference = None
    # A peer judges pairs by the vectors that the head would multiply.
    if reference.ndim == found.ndim == 2:
        cosine = float(cosines(found, reference).min())
    elif reference.ndim == found.ndim:
        difference = float(np.abs(found - reference).max())
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


def start_cold(side: Side, work: Work, starts: int) -> list[float]:
    """Seconds from the start of a new process to its first answer; files are in the page cache.

    Args:
        side: Which.
        work: Whose first part it is asked for.
        starts: How many processes, one behind the other; one more goes before them.
    """
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        rows, vectors = Path(folder) / "rows.npz", Path(folder) / "vectors.npy"
        write_rows(rows, work.part(0))
        request = {"rows": str(rows), "batch_rows": 1, "vectors": str(vectors)}
        for _ in range(starts + 1):
            began = time.perf_counter()
            worker = Worker(side.command)
            worker.ask(request)
            seconds.append(time.perf_counter() - began)
            worker.close()
    return [round(each, 3) for each in seconds[1:]]


def to_json(results: dict[str, Result]) -> dict[str, Any]:
    """Results as JSON holds them."""
    return {name: asdict(each) for name, each in results.items()}
