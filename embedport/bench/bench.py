"""Artifacts and peers over every kind of work, and what each costs beside time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..hub import fetch
from ..integrity import cache_folder
from ..runtimes import read_facts
from .machine import describe, measure_peak
from .race import Race, Result, start_cold
from .sides import PEERS, Side, our_side, peer_side
from .work import (
    CANDIDATES,
    PARTS,
    PASSAGES,
    QUERIES,
    QUICK_SHAPES,
    SHAPES,
    Work,
    passages,
    reranking,
    uniform,
)

ROUNDS, COLD_STARTS = 5, 3


@dataclass(frozen=True)
class SideFacts:
    """What a side is, and what it costs beside time.

    Attributes:
        bytes: Of its folder.
        cold_start: Seconds from a process's start to its first answer, one a start.
        peak_bytes: Its largest resident set in all of the work.
        versions: Of a peer's packages.
    """

    bytes: int
    cold_start: list[float]
    peak_bytes: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """The results of `bench`.

    Attributes:
        machine: What it ran on, as `machine.describe` says.
        threads: Of each side.
        peak: Fastest matrix products in onnxruntime here, in 10^12 operations a second.
        sides: The sides by name; the first is what the others are measured by.
        works: The results by the work's name and the side's.
        failures: The sides that did not survive a work, and what they said; named alike.
    """

    machine: dict[str, Any]
    threads: int
    peak: dict[str, float]
    sides: dict[str, SideFacts]
    works: dict[str, dict[str, Result]]
    failures: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def bench(
    artifacts: Sequence[str | Path],
    *,
    peers: Sequence[str] = (),
    checkpoint: str | Path | None = None,
    rounds: int = ROUNDS,
    quick: bool = False,
    cache: Path | None = None,
    say: Callable[[str], None] = lambda stage: None,
) -> Bench:
    """Race artifacts against one another and against peers, on this machine's CPU.

    Every side gets the same token ids and the same threads, and chooses its best batch; rounds are
    interleaved. Embedding models run rows of one length and passages of mixed length, rerankers
    pairs. Peers run a reranker's pairs through its model without the head, which is hardly less.

    Args:
        artifacts: Artifacts, or checkpoints that torch runs; of one task. The first is what all
            others are measured by.
        peers: Names of `sides.PEERS`.
        checkpoint: What peers are to serve: a folder or hub id of the same geometry.
        rounds: Of each work of one length; passages and pairs have a round for each of their parts;
            sides that compute in wider types have one.
        quick: A few minutes' worth.
        cache: Where peers' models are kept; in the user's cache folder by default.
        say: Told what is being done.

    Raises:
        InputError: Artifacts of different tasks, one side twice, an unknown peer, or peers without
            a checkpoint or the other way round.
        EmbedportError: A side cannot be opened, or ends.
    """
    _check(artifacts, peers, checkpoint)
    facts = [read_facts(artifact) for artifact in artifacts]
    if len({each.task for each in facts}) > 1:
        raise InputError(
            f"{artifacts[0]} is of another task than the rest; race embedding models or rerankers"
        )
    sides = _distinct([our_side(artifact) for artifact in artifacts])
    if peers:
        assert checkpoint is not None
        folder = fetch(checkpoint).folder
        place = cache or cache_folder("bench")
        sides += [peer_side(PEERS[name], folder, place, say) for name in peers]
    tokenizer = facts[0].folder / "tokenizer.json"
    works = _works(facts[0].task, tokenizer, quick)
    results: dict[str, dict[str, Result]] = {}
    with Race(sides, say) as race:
        for work in works:
            # A part that every round repeats needs rounds; parts are rounds themselves.
            count = len(work.parts) if len(work.parts) > 1 else rounds
            results[work.name] = race.run(work, count)
        threads, failures = race.threads, race.failures
    first = _first(facts[0].task, tokenizer)
    found = {}
    for side in sides:
        say(f"{side.name}: cold starts")
        seconds = start_cold(side, first, 1 if quick else COLD_STARTS)
        peak = max(
            (each[side.name].peak_bytes for each in results.values() if side.name in each),
            default=0,
        )
        found[side.name] = SideFacts(side.size, seconds, peak, side.versions)
    return Bench(describe(), threads, measure_peak(), found, results, failures)


def _check(
    artifacts: Sequence[str | Path], peers: Sequence[str], checkpoint: str | Path | None
) -> None:
    if unknown := [name for name in peers if name not in PEERS]:
        raise InputError(f"no peer is named {unknown[0]!r}; there are {', '.join(PEERS)}")
    if peers and checkpoint is None:
        raise InputError(
            "peers serve a checkpoint: say which with --checkpoint, best the one that the artifact "
            "was made from"
        )
    if checkpoint is not None and not peers:
        raise InputError("--checkpoint is what peers serve, and there are none: give --peer")
    if twice := [name for name, count in Counter(peers).items() if count > 1]:
        raise InputError(f"peer {twice[0]} is given twice")


def _works(task: str, tokenizer: Path, quick: bool) -> list[Work]:
    if task == "reranker":
        few = (2, 25) if quick else (QUERIES, CANDIDATES)
        return [reranking(tokenizer, *few)]
    shapes = QUICK_SHAPES if quick else SHAPES
    mixed = (100, 2) if quick else (PASSAGES, PARTS)
    works = [uniform(tokenizer, *shape) for shape in shapes]
    # What takes most memory goes last: runtimes keep what they once took.
    return sorted([*works, passages(tokenizer, *mixed)], key=_longest)


def _first(task: str, tokenizer: Path) -> Work:
    """What a new process is asked for: one short text, or one pair."""
    if task == "reranker":
        return reranking(tokenizer, 1, 1)
    return uniform(tokenizer, 1, 32)


def _longest(work: Work) -> int:
    return max(len(row) for part in work.parts for row in part)


def _distinct(sides: list[Side]) -> list[Side]:
    """Sides whose names differ: those of one precision by their folders.

    Raises:
        InputError: A folder is given twice.
    """
    precisions = Counter(side.name for side in sides)
    folders = Counter((side.name, side.folder.name) for side in sides)
    named = []
    for side in sides:
        alike = folders[side.name, side.folder.name] > 1
        folder = side.folder.absolute() if alike else side.folder.name
        is_alone = precisions[side.name] == 1
        named.append(side if is_alone else replace(side, name=f"{side.name} ({folder})"))
    if twice := [name for name, count in Counter(each.name for each in named).items() if count > 1]:
        raise InputError(f"{twice[0]} is given twice: a side is measured by the others")
    return named
