"""A corpus embedded on a Ray cluster: one model an actor, a shard a task.

Ray starts an actor again that died and repeats its task; a shard has its name or has not, so every
row is there once. All machines must see the model, the input and the output under the same paths.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ..corpus import Part
from ..errors import EmbedportError, InputError, require
from .batching import count_cores
from .bulk import Job, encode_shard, open_embedder
from .embedder import Embedder


class ShardWorker:
    """An actor: the job's model, loaded once.

    Args:
        job: What to do.
        machine_actors: Actors of a machine.
    """

    def __init__(self, job: Job, machine_actors: int) -> None:
        self._job = job
        # Ray sets 1, and an actor without a GPU has its share of a machine's cores.
        os.environ.pop("OMP_NUM_THREADS", None)
        os.environ["OMP_NUM_THREADS"] = str(max(1, count_cores() // machine_actors))
        self._embedder: Embedder | None = None

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Embed a shard, {"number": …, "part": …}.

        Returns:
            Its rows, and what is wrong, which is nothing: raised, it would reach the driver as the
            text of Ray's own error.
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
    """The engine that runs on the Ray cluster that RAY_ADDRESS names, or on one of this machine.

    Args:
        job: What to do; its paths are absolute.
        shards: Numbers and places of the shards to embed.
        advance: Told how many rows are done.
        workers: Actors; by default one a GPU, or one a machine where there is none.

    Raises:
        MissingPackageError: Ray is not installed.
        InputError: What a worker found wrong.
    """
    require("ray", "ray")
    import ray
    import ray.data

    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    ray.data.DataContext.get_current().enable_progress_bars = False
    gpus = 0 if job.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    nodes = sum(node["Alive"] for node in ray.nodes())
    actors = workers or gpus or nodes
    worker: Any = ShardWorker  # Ray's annotation knows of functions only
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
