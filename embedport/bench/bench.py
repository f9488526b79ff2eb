"""Artifacts and peers over every kind of work, and what each costs beside time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..integrity import cache_folder
from ..runtimes import read_facts
from ..spec import ModelSpec, Task
from .checks import check_models, check_request, check_space, check_work, read_checkpoint
from .machine import describe, measure_peak
from .race import Race, Result, start_cold
from .sides import (
    PEERS,
    Installed,
    Peer,
    Side,
    Worker,
    install_peer,
    our_side,
    peer_side,
    with_sources,
)
from .threads import choose_threads
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
        threads: What each side was told to work with.
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
    task: Task | None = None,
) -> Bench:
    """Race artifacts against one another and against peers, on this machine's CPU.

    Every side gets the same token ids, is told the same number of threads, and chooses its best
    batch; rounds are interleaved. Embedding models run rows of one length and passages of mixed
    length, rerankers pairs. Peers run a reranker's pairs through its model without the head, which
    is hardly less. What can be wrong is looked at before peers are installed and prepared.

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
        task: "embedding" or "reranker", for checkpoints whose files do not tell.

    Raises:
        InputError: The request is wrong in itself (see `checks`), or one side is given twice.
        EmbedportError: A side cannot be opened, or ends.
    """
    check_request(artifacts, peers, checkpoint, rounds)
    machine, threads = describe(), choose_threads()
    facts = [read_facts(artifact, task) for artifact in artifacts]
    check_models(facts)
    sides = _distinct([our_side(each, threads) for each in facts])
    tokenizer = facts[0].folder / "tokenizer.json"
    works = _works(facts[0].task, tokenizer, quick)
    check_work(works, facts)
    if peers:
        assert checkpoint is not None
        spec = read_checkpoint(checkpoint, facts[0])
        check_work(works, [spec])
        _try(sides, say)
        place = cache or cache_folder("bench")
        sides += _peer_sides([PEERS[name] for name in peers], spec, place, threads, say)
    results: dict[str, dict[str, Result]] = {}
    with Race(sides, threads, say) as race:
        for work in works:
            # A part that every round repeats needs rounds; parts are rounds themselves.
            count = len(work.parts) if len(work.parts) > 1 else rounds
            results[work.name] = race.run(work, count)
        failures = race.failures
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
    return Bench(machine, threads, measure_peak(), found, results, failures)


def _try(sides: Sequence[Side], say: Callable[[str], None]) -> None:
    """Load our sides, so that one that cannot be ends the race before peers are prepared."""
    for side in sides:
        say(f"{side.name}: trying")
        Worker(side.command).close()


def _peer_sides(
    peers: Sequence[Peer], spec: ModelSpec, cache: Path, threads: int, say: Callable[[str], None]
) -> list[Side]:
    """Peers as sides: all are installed before the first is prepared."""
    check_space(peers, spec, cache)
    installed: dict[str, Installed] = {}
    for peer in with_sources(peers):
        if peer.script not in installed:
            say(f"{peer.name}: installing")
            installed[peer.script] = install_peer(peer.script)
    folder = spec.source.folder
    return [peer_side(peer, installed, folder, cache, threads, say) for peer in peers]


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
