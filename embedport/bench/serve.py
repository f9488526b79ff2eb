"""Our runner of a benchmark: `python -m embedport.bench.serve FOLDER THREADS TASK`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from ..checkpoint.spec import Task
from ..errors import EmbedportError
from ..runtimes import Reranker, load
from .peers import serving
from .threads import choose_threads


def main(folder: str, threads: str, task: Task) -> None:
    """Answer requests with a model, in batches that the runtime forms.

    `load` sets the number of onnxruntime's threads from the environment; torch's is set here.
    """
    model = load(folder, device="cpu", task=task)
    used = choose_threads()
    if torch := sys.modules.get("torch"):  # imported by `load`, where it runs the model
        torch.set_num_threads(int(threads))
        used = torch.get_num_threads()

    def run(rows: Sequence[np.ndarray], batch_rows: int) -> np.ndarray:
        del batch_rows
        if isinstance(model, Reranker):
            return model.score_rows(rows, [0] * len(rows))
        return model.embed_rows(rows)

    serving.serve(run, used)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])  # ty: ignore[invalid-argument-type] (our runner's own)
    except EmbedportError as error:
        sys.exit(str(error))
