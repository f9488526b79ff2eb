"""The best number of tokens per batch on a CPU: int8 at the 0.6B geometry."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

from embedport.bench.workloads import passages, uniform

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours

BUDGETS = (128, 256, 512, 1024, 2048, 4096)


def compare_batches(rounds: int, results: Path = RESULTS) -> None:
    """Tokens per second at each batch budget, for rows of 128 tokens and for mixed passages.

    Args:
        rounds: Interleaved rounds. Each repeats the rows of 128 tokens, or takes the next hundred
            passages.
        results: Folder of the results.
    """
    import embedport

    source = checkpoint("0.6b")
    figures: dict[str, dict[int, dict[str, float]]] = {}
    with scratch() as folder:
        artifact = export_ours(source, folder, "int8")
        embedder = embedport.load_embedder(artifact, device="cpu")
        tokenizer = artifact / "tokenizer.json"
        for workload in (uniform(tokenizer, 32, 128), passages(tokenizer)):
            embedder.embed_rows(workload.part(0), batch_tokens=BUDGETS[-1])
            speeds: dict[int, list[float]] = {budget: [] for budget in BUDGETS}
            for number in range(rounds):
                rows = workload.part(number)
                for budget in BUDGETS if number % 2 == 0 else BUDGETS[::-1]:
                    start = time.perf_counter()
                    embedder.embed_rows(rows, batch_tokens=budget)
                    seconds = time.perf_counter() - start
                    speeds[budget].append(sum(map(len, rows)) / seconds)
            figures[workload.name] = {
                budget: {
                    "tokens_per_second": round(median(values), 1),
                    "slowest": round(min(values), 1),
                    "fastest": round(max(values), 1),
                }
                for budget, values in speeds.items()
            }
    for name, budgets in figures.items():
        print_table(
            [f"{name}: tokens of a batch", "tokens/s", "from", "to"],
            [[budget, *values.values()] for budget, values in budgets.items()],
        )
    save("batches-0.6b-int8", figures, results)
