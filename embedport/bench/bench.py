"""bench(): compare artifacts and peers over every workload; also measure start-up, memory, disk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..checkpoint.spec import ModelSpec, Task
from ..errors import InputError
from ..integrity import cache_folder
from ..runtimes import read_info
from .checks import check_models, check_request, check_space, check_workloads, read_checkpoint
from .machine import describe, measure_peak
from .rounds import Benchmark, Result, start_cold
from .runners import (
    PEERS,
    Installed,
    Peer,
    Runner,
    Worker,
    install_peer,
    our_runner,
    peer_runner,
    with_sources,
)
from .threads import choose_threads
from .workloads import (
    CANDIDATES,
    PARTS,
    PASSAGES,
    QUERIES,
    QUICK_SHAPES,
    SHAPES,
    Workload,
    passages,
    reranking,
    uniform,
)

ROUNDS, COLD_STARTS = 5, 3


@dataclass(frozen=True)
class RunnerCosts:
    """A runner's costs other than speed.

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
        threads: Number of threads that each runner was told to use.
        peak: Fastest matrix products in onnxruntime here, in 10^12 operations per second.
        runners: Name of each runner to its costs; the others are compared with the first.
        workloads: Workload's name to runner's name to result.
        failures: Workload's name to name of each runner that failed, to its last output.
    """

    machine: dict[str, Any]
    threads: int
    peak: dict[str, float]
    runners: dict[str, RunnerCosts]
    workloads: dict[str, dict[str, Result]]
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
    """Compare artifacts with each other and with peers, on this machine's CPU.

    Every runner gets the same token ids and the same number of threads, and uses its best
    batch size; rounds are interleaved. Embedding models run rows of one length and passages of
    mixed length; rerankers run pairs. Peers run pairs without the head, which is hardly less work.
    Everything that can be checked is checked before peers are installed and prepared.

    Args:
        artifacts: Artifacts, or checkpoints, as `load` runs them; all of one task. The others are
            compared with the first.
        peers: Names from `runners.PEERS`.
        checkpoint: The checkpoint that peers serve: a folder or hub id with the same geometry.
        rounds: Rounds of each workload of one length. Passages and pairs have one round for each
            of their parts. Sides that compute in wider types have one round.
        quick: Run a short version, in a few minutes.
        cache: Folder for peers' models; in the user's cache folder by default.
        say: Called with a description of each stage.
        task: "embedding" or "reranker", for checkpoints that do not declare their task.

    Raises:
        InputError: The request is wrong (see `checks`), or a runner is given twice.
        EmbedportError: A runner cannot be opened, or its process ends.
    """
    check_request(artifacts, peers, checkpoint, rounds)
    machine, threads = describe(), choose_threads()
    models = [read_info(artifact, task) for artifact in artifacts]
    check_models(models)
    runners = _distinct([our_runner(model, threads) for model in models])
    tokenizer = models[0].folder / "tokenizer.json"
    workloads = _workloads(models[0].task, tokenizer, quick)
    check_workloads(workloads, models)
    spec = None
    if peers:
        assert checkpoint is not None
        spec = read_checkpoint(checkpoint, models[0])
        check_workloads(workloads, [spec])
    # The first load of a 4-bit checkpoint writes its graph: not in a process that is measured.
    if peers or any(model.checkpoint is not None for model in models):
        _try(runners, say)
    if spec is not None:
        place = cache or cache_folder("bench")
        runners += _peer_runners([PEERS[name] for name in peers], spec, place, threads, say)
    results: dict[str, dict[str, Result]] = {}
    with Benchmark(runners, threads, say) as benchmark:
        for workload in workloads:
            # A workload of several parts runs one round per part.
            count = len(workload.parts) if len(workload.parts) > 1 else rounds
            results[workload.name] = benchmark.run(workload, count)
        failures = benchmark.failures
    first = _first(models[0].task, tokenizer)
    costs = {}
    for runner in runners:
        say(f"{runner.name}: cold starts")
        seconds = start_cold(runner, first, 1 if quick else COLD_STARTS)
        own = [row[runner.name] for row in results.values() if runner.name in row]
        peak = max((result.peak_bytes for result in own), default=0)
        costs[runner.name] = RunnerCosts(runner.size, seconds, peak, runner.versions)
    return Bench(machine, threads, measure_peak(), costs, results, failures)


def _try(runners: Sequence[Runner], say: Callable[[str], None]) -> None:
    """Load our runners once, so that a failure shows before peers are prepared."""
    for runner in runners:
        say(f"{runner.name}: trying")
        Worker(runner.command).close()


def _peer_runners(
    peers: Sequence[Peer], spec: ModelSpec, cache: Path, threads: int, say: Callable[[str], None]
) -> list[Runner]:
    """Install all peers, then prepare each as a runner."""
    check_space(peers, spec, cache)
    installed: dict[str, Installed] = {}
    for peer in with_sources(peers):
        if peer.script not in installed:
            say(f"{peer.name}: installing")
            installed[peer.script] = install_peer(peer.script)
    folder = spec.source.folder
    return [peer_runner(peer, installed, folder, cache, threads, say) for peer in peers]


def _workloads(task: str, tokenizer: Path, quick: bool) -> list[Workload]:
    if task == "reranker":
        few = (2, 25) if quick else (QUERIES, CANDIDATES)
        return [reranking(tokenizer, *few)]
    shapes = QUICK_SHAPES if quick else SHAPES
    mixed = (100, 2) if quick else (PASSAGES, PARTS)
    workloads = [uniform(tokenizer, *shape) for shape in shapes]
    # The longest rows go last: runtimes do not give memory back.
    return sorted([*workloads, passages(tokenizer, *mixed)], key=lambda workload: workload.longest)


def _first(task: str, tokenizer: Path) -> Workload:
    """The request of a cold start: one short text, or one pair."""
    if task == "reranker":
        return reranking(tokenizer, 1, 1)
    return uniform(tokenizer, 1, 32)


def _distinct(runners: list[Runner]) -> list[Runner]:
    """Make the runners' names unique: runners of one precision get their folder's name.

    Raises:
        InputError: A folder is given twice.
    """
    precisions = Counter(runner.name for runner in runners)
    folders = Counter((runner.name, runner.folder.name) for runner in runners)
    renamed = []
    for runner in runners:
        has_twin = folders[runner.name, runner.folder.name] > 1
        folder = runner.folder.absolute() if has_twin else runner.folder.name
        is_unique = precisions[runner.name] == 1
        renamed.append(runner if is_unique else replace(runner, name=f"{runner.name} ({folder})"))
    if twice := [
        name for name, count in Counter(runner.name for runner in renamed).items() if count > 1
    ]:
        raise InputError(f"{twice[0]} is given twice: runners are compared with each other")
    return renamed
