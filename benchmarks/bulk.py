"""200,000 short texts with the demo embedder: memory over time, and a resume after kill -9."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import ROOT, scratch
from .machine import RESULTS, print_table, save
from .process import ours

TEXTS = 200_000
CHECKED = 2_000
INTERVAL = 0.25  # seconds between memory samples
CHART = ROOT / "docs" / "bulk-memory.svg"


def measure_bulk(results: Path = RESULTS, texts: int = TEXTS, chart: Path = CHART) -> None:
    """Encode a corpus, kill -9 midway, and run the same command again.

    Raises:
        RuntimeError: A row is missing, belongs to another text, or was computed twice.
    """
    import embedport
    from embedport.demo.pipeline import builtin_embedder

    with scratch() as folder:
        embedport.export(builtin_embedder(), folder / "model", precision="int8")
        corpus = write_corpus(folder / "corpus.jsonl", texts)
        output = folder / "vectors"
        command = ours(
            *("encode", str(folder / "model"), "--input", str(corpus)),
            *("--output", str(output), "--device", "cpu"),
        )
        first = watch(command, output, kill_at=texts // 2)
        modified = {path.name: path.stat().st_mtime_ns for path in output.glob("*.npy")}
        second = watch(command, output)
        rewritten = [
            name
            for name, time_ns in modified.items()
            if (output / name).stat().st_mtime_ns != time_ns
        ]
        if rewritten:
            raise RuntimeError(
                f"{len(rewritten)} shards were computed twice, such as {rewritten[0]}"
            )
        worst = check_rows(folder / "model", corpus, output, texts)
    figures = {
        "texts": texts,
        "shards_when_killed": len(modified),
        "runs": [
            {
                "seconds": round(run["seconds"], 1),
                "rows": run["rows"],
                "rows_per_second": round(run["rows"] / run["seconds"]),
                **flatness(run["memory"]),
                "memory": run["memory"],
            }
            for run in (first, second)
        ],
        "minimum_cosine": worst,
    }
    print_table(
        ["run", "rows", "seconds", "rows/s", "MB at a quarter", "MB at the end"],
        [
            [name, run["rows"], run["seconds"], run["rows_per_second"]]
            + [round(run[key] / 1e6, 1) for key in ("bytes_at_a_quarter", "bytes_at_the_end")]
            for name, run in zip(("killed", "resumed"), figures["runs"], strict=True)
        ],
    )
    save("bulk-demo", figures, results)
    draw(figures["runs"], chart)


def write_corpus(path: Path, texts: int) -> Path:
    """Write distinct texts of one to four WordNet definitions each."""
    from embedport.texts.beir import read_beir

    definitions = list(read_beir("builtin").documents.values())
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(texts):
            indices = generator.integers(len(definitions), size=1 + i % 4)
            text = "; ".join(definitions[j] for j in indices)
            file.write(json.dumps({"_id": str(i), "text": text}) + "\n")
    return path


def watch(command: list[str], output: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Run a command and record its memory and the number of rows it writes.

    Args:
        command: The command.
        output: Folder of its shards.
        kill_at: Number of rows after which it is killed with SIGKILL.

    Returns:
        seconds; rows that this run wrote; memory, a list of (seconds, resident bytes).
    """

    def rows() -> int:
        return sum(len(np.load(path, mmap_mode="r")) for path in output.glob("*.npy"))

    memory: list[tuple[float, int]] = []
    rows_before = rows()
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if (resident := resident_bytes(process.pid)) is not None:
                memory.append((round(time.perf_counter() - start, 2), resident))
            if kill_at is not None and rows() >= kill_at:
                process.send_signal(signal.SIGKILL)
            time.sleep(INTERVAL)
    seconds = time.perf_counter() - start
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{command} ended with {process.returncode}")
    return {"seconds": seconds, "rows": rows() - rows_before, "memory": memory}


def resident_bytes(pid: int) -> int | None:
    """A process's resident set; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS:")), None)


def flatness(memory: list[tuple[float, int]]) -> dict[str, int]:
    """Median resident set in a tenth of the run after its first quarter, and in its last tenth."""
    values = [resident for _, resident in memory]
    tenth = max(1, len(values) // 10)
    quarter = len(values) // 4
    return {
        "bytes_at_a_quarter": int(np.median(values[quarter : quarter + tenth])),
        "bytes_at_the_end": int(np.median(values[-tenth:])),
        "peak_bytes": max(values),
    }


def check_rows(model: Path, corpus: Path, output: Path, texts: int) -> float:
    """The smallest cosine of a row and its text's vector, over a random sample.

    Raises:
        RuntimeError: Rows are missing, or a row belongs to another text.
    """
    import embedport

    vectors = np.concatenate([np.load(path) for path in sorted(output.glob("*.npy"))])
    if len(vectors) != texts:
        raise RuntimeError(f"{texts:,} texts, {len(vectors):,} rows")
    lines = corpus.read_text(encoding="utf-8").splitlines()
    sample = np.random.default_rng(1).choice(texts, min(CHECKED, texts), replace=False)
    embedder = embedport.load_embedder(model, device="cpu")
    expected = embedder.encode([json.loads(lines[i])["text"] for i in sample])
    worst = float((vectors[sample] * expected).sum(axis=1).min())
    if worst < 0.9999:
        raise RuntimeError(f"a row belongs to another text: cosine {worst}")
    return worst


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draw the resident memory over time, one run after the other."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    start = 0.0
    for run, name in zip(runs, ("killed with kill -9", "resumed"), strict=True):
        seconds, memory = zip(*run["memory"], strict=True)
        axes.plot([start + s for s in seconds], [m / 1e6 for m in memory], label=name)
        start += run["seconds"]
    axes.set(xlabel="seconds", ylabel="resident memory, MB", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")
