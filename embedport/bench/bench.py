"""bench(): race artifacts and peers over every workload; also measure start-up, memory, disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.spec import ModelSpec, Task
from ..errors import InputError
from ..integrity import cache_folder
from ..runtimes import read_facts
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
    """A side's costs other than speed.

    Attributes:
        bytes: Size of its folder.
        cold_start: Seconds from a process's start to its first answer, for each start.
        peak_bytes: Its largest resident set over all workloads.
        versions: Versions of a peer's packages.
    """

    bytes: int
    cold_start: list[float]
    peak_bytes: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Bench:
    """The results of `bench`.

    Attributes:
        machine: The machine, from `machine.describe`.
        threads: Number of threads that each side was told to use.
        peak: Fastest matrix products in onnxruntime here, in 10^12 operations per second.
        sides: Name of each side to its costs; the others are compared with the first.
        works: Workload's name to side's name to result.
        failures: Workload's name to name of each side that failed, to its last output.
    """

    machine: dict[str, Any]
    threads: int
    peak: dict[str, float]
    sides: dict[str, SideFacts]
    works: dict[str, dict[str, Result]]
    failures: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """The results as JSON values."""
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
    """Race artifacts against each other and against peers, on this machine's CPU.

    Every side gets the same token ids and the same number of threads, and uses its best batch size;
    rounds are interleaved. Embedding models run rows of one length and passages of mixed length;
    rerankers run pairs. Peers run a reranker's pairs without the head, which is hardly less work.
    Everything that can be checked is checked before peers are installed and prepared.

    Args:
        artifacts: Artifacts, or checkpoints, which torch runs; all of one task. The others are
            compared with the first.
        peers: Names from `sides.PEERS`.
        checkpoint: The checkpoint that peers serve: a folder or hub id with the same geometry.
        rounds: Rounds of each workload of one length. Passages and pairs have one round for each
            of their parts. Sides that compute in wider types have one round.
        quick: Run a short version, in a few minutes.
        cache: Folder for peers' models; in the user's cache folder by default.
        say: Called with a description of each stage.
        task: "embedding" or "reranker", for checkpoints that do not declare their task.

    Raises:
        InputError: The request is wrong (see `checks`), or a side is given twice.
        EmbedportError: A side cannot be opened, or its process ends.
    """
    check_request(artifacts, peers, checkpoint, rounds)
    machine, threads = describe(), choose_threads()
    facts = [read_facts(artifact, task) for artifact in artifacts]
    check_models(facts)
    sides = _distinct([our_side(model, threads) for model in facts])
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
            # A workload of several parts runs one round per part.
            count = len(work.parts) if len(work.parts) > 1 else rounds
            results[work.name] = race.run(work, count)
        failures = race.failures
    first = _first(facts[0].task, tokenizer)
    side_facts = {}
    for side in sides:
        say(f"{side.name}: cold starts")
        seconds = start_cold(side, first, 1 if quick else COLD_STARTS)
        peak = max(
            (by_side[side.name].peak_bytes for by_side in results.values() if side.name in by_side),
            default=0,
        )
        side_facts[side.name] = SideFacts(side.size, seconds, peak, side.versions)
    return Bench(machine, threads, measure_peak(), side_facts, results, failures)


def _try(sides: Sequence[Side], say: Callable[[str], None]) -> None:
    """Load our sides once, so that a failure shows before peers are prepared."""
    for side in sides:
        say(f"{side.name}: trying")
        Worker(side.command).close()


def _peer_sides(
    peers: Sequence[Peer], spec: ModelSpec, cache: Path, threads: int, say: Callable[[str], None]
) -> list[Side]:
    """Install all peers, then prepare each as a side."""
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
    # The longest rows go last: runtimes do not give memory back.
    return sorted([*works, passages(tokenizer, *mixed)], key=_longest)


def _first(task: str, tokenizer: Path) -> Work:
    """The request of a cold start: one short text, or one pair."""
    if task == "reranker":
        return reranking(tokenizer, 1, 1)
    return uniform(tokenizer, 1, 32)


def _longest(work: Work) -> int:
    return max(len(row) for part in work.parts for row in part)


def _distinct(sides: list[Side]) -> list[Side]:
    """Make the sides' names unique: sides of one precision get their folder's name.

    Raises:
        InputError: A folder is given twice.
    """
    precisions = Counter(side.name for side in sides)
    folders = Counter((side.name, side.folder.name) for side in sides)
    renamed = []
    for side in sides:
        has_twin = folders[side.name, side.folder.name] > 1
        folder = side.folder.absolute() if has_twin else side.folder.name
        is_unique = precisions[side.name] == 1
        renamed.append(side if is_unique else replace(side, name=f"{side.name} ({folder})"))
    if twice := [
        name for name, count in Counter(side.name for side in renamed).items() if count > 1
    ]:
        raise InputError(f"{twice[0]} is given twice: sides are compared with each other")
    return renamed
