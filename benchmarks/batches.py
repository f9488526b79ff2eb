"""How many tokens a CPU batch should have: int8 at the 0.6B geometry."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median

from embedport.bench.work import passages, uniform

from .checkpoint import CACHE, checkpoint
from .machine import RESULTS, print_table, save
from .process import export_ours

BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def by_tokens(rounds: int, results: Path = RESULTS) -> None:
    """Tokens a second at each budget: rows of 128 tokens, and passages of mixed length, in turn.

    Args:
        rounds: Over the same rows of 128 tokens; of the passages each takes the next hundred.
        results: Folder of the results.
    """
    import embedport

    source = checkpoint("0.6b")
    CACHE.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        artifact = export_ours(source, Path(temporary), "int8")
        embedder = embedport.load(artifact, device="cpu")
        assert isinstance(embedder, embedport.Embedder)
        tokenizer = artifact / "tokenizer.json"
        for work in (uniform(tokenizer, 32, 128), passages(tokenizer)):
            embedder.embed_rows(work.part(0), batch_tokens=BUDGETS[-1])
            speeds: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
            for number in range(rounds):
                rows = work.part(number)
                for budget in BUDGETS if number % 2 == 0 else BUDGETS[::-1]:
                    began = time.perf_counter()
                    embedder.embed_rows(rows, batch_tokens=budget)
                    spent = time.perf_counter() - began
                    speeds[budget].append(sum(map(len, rows)) / spent)
            found[work.name] = {
                budget: {
                    "tokens_per_second": round(median(each), 1),
                    "slowest": round(min(each), 1),
                    "fastest": round(max(each), 1),
                }
                for budget, each in speeds.items()
            }
    for name, budgets in found.items():
        print_table(
            [f"{name}: tokens of a batch", "tokens/s", "from", "to"],
            [[budget, *each.values()] for budget, each in budgets.items()],
        )
    save("batches-0.6b-int8", found, results)
