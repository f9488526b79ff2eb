"""How many tokens a CPU batch should have: int8 at the 0.6B geometry, rows of 128 tokens."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from embedport.bench.work import uniform

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import export_ours

ROWS, SIZE = 32, 128
BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def by_tokens(rounds: int, results: Path = RESULTS) -> None:
    """Tokens a second at each budget, all on the same rows, in turn."""
    import embedport

    source = checkpoint("0.6b")
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        artifact = export_ours(source, Path(temporary), "int8")
        embedder = embedport.load(artifact, device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        rows = uniform(artifact / "tokenizer.json", ROWS, SIZE).part(0)
        for budget in BUDGETS:
            embedder.embed_rows(rows, batch_tokens=budget)
        speeds: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
        for number in range(rounds):
            for budget in BUDGETS if number % 2 == 0 else BUDGETS[::-1]:
                began = time.perf_counter()
                embedder.embed_rows(rows, batch_tokens=budget)
                speeds[budget].append(ROWS * SIZE / (time.perf_counter() - began))
    found = {
        budget: {
            "tokens_per_second": round(median(each), 1),
            "from_to": [round(min(each), 1), round(max(each), 1)],
        }
        for budget, each in speeds.items()
    }
    print_table(
        ["tokens of a batch", "tokens/s", "from, to"],
        [[budget, *each.values()] for budget, each in found.items()],
    )
    save("batches-0.6b-int8", {"rows": ROWS, "tokens": SIZE, "budgets": found}, results)
