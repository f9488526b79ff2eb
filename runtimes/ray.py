"""Embed a corpus on a Ray cluster: one model per actor, one shard per task.

Ray restarts an actor that died and repeats its task. A shard file gets its name only when it is
complete, so every row is written exactly once. All machines must see the model, the input and the
output under the same paths.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import EmbedportError, InputError, require
from ..texts.corpus import Part
from .batching import count_cores
from .bulk import Job, encode_shard, open_embedder
from .embedder import Embedder


class ShardWorker:
    """A Ray actor that loads the job's model once.

    Args:
        job: The job.
        machine_actors: Number of actors per machine.
    """

    def __init__(self, job: Job, machine_actors: int) -> None:
        self._job = job
        # Ray sets 1; an actor without a GPU should use its share of the machine's cores.
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // machine_actors))
        self._embedder: Embedder | None = None

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Embed a shard, {"number": …, "part": …}.

        Returns:
            The number of its rows, and an error message, empty on success. A raised error would
            reach the driver only as the text of one of Ray's errors.
        """
        part = Part(**shard["part"])
        try:
            self._embedder = self._embedder or open_embedder(self._job)
            encode_shard(self._embedder, self._job, shard["number"], part)
        except EmbedportError as error:
            return {"rows": 0, "wrong": str(error)}
        return {"rows": part.rows, "wrong": ""}


def run_on_ray(
    job: Job,
    shards: Sequence[tuple[int, Part]],
    advance: Callable[[int], None],
    workers: int | None = None,
) -> None:
    """The engine for a Ray cluster: the one at RAY_ADDRESS, or a new one on this machine.

    Args:
        job: The job; its paths are absolute.
        shards: The shards to embed: their numbers, and where their texts are.
        advance: Called with the number of rows just done.
        workers: Number of actors; by default one per GPU, or without GPUs one per machine.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: A worker failed on its shard, and the message is the worker's; or the cluster
            cannot be reached or does not start.
    """
    require("ray", "ray")
    import ray
    import ray.data

    if not ray.is_initialized():
        try:
            ray.init(logging_level=logging.WARNING)
        except Exception as error:  # its own, ConnectionError or RuntimeError, by what is wrong
            place = os.environ.get("RAY_ADDRESS") or "on this machine"
            raise InputError(f"no Ray cluster {place}: {' '.join(str(error).split())}") from error
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 0 if job.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    nodes = sum(node["Alive"] for node in ray.nodes())
    actors = workers or gpus or nodes
    worker: Any = ShardWorker  # Ray's annotation allows only functions
    rows = [{"number": number, "part": asdict(part)} for number, part in shards]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        worker,
        fn_constructor_args=(job, -(-actors // nodes)),
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=None if gpus else 1,
        num_gpus=1 if gpus else None,
    )
    for row in done.iter_rows():
        if row["wrong"]:
            raise InputError(row["wrong"])
        advance(row["rows"])
