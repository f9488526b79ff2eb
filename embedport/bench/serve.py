"""Our side of a race: `python -m embedport.bench.serve FOLDER`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from ..runtimes import Reranker, load
from .peers import serving


def main(folder: str) -> None:
    """Answer requests about a model's rows, batches as the runtime chooses them."""
    import onnxruntime  # noqa: F401 (before threads are counted: its import starts some)

    before = serving.count_threads()
    model = load(folder, device="cpu")
    # torch starts its threads when it first works.
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch else serving.count_threads() - before + 1

    def run(rows: Sequence[np.ndarray], batch_rows: int) -> np.ndarray:
        del batch_rows
        if isinstance(model, Reranker):
            return model.score_rows(rows, [0] * len(rows))
        return model.embed_rows(rows)

    serving.serve(run, threads)


if __name__ == "__main__":
    main(sys.argv[1])
