"""200,000 short texts with the demo embedder: memory over time, killed midway, every row once."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import CACHE, ROOT
from .machine import RESULTS, print_table, save
from .process import ours

TEXTS = 200_000
CHECKED = 2_000
INTERVAL = 0.25  # seconds between looks at the memory
CHART = ROOT / "docs" / "bulk-memory.svg"


def many_short_texts(results: Path = RESULTS, texts: int = TEXTS, chart: Path = CHART) -> None:
    """Encode, kill -9 in the middle, run the same command again.

    Raises:
        RuntimeError: A row is missing, another text's, or was done twice.
    """
    import embedport
    from embedport.demo.pipeline import builtin_embedder

    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
        folder = Path(temporary)
        embedport.export(builtin_embedder(), folder / "model", precision="int8")
        corpus = write_corpus(folder / "corpus.jsonl", texts)
        output = folder / "vectors"
        command = ours(
            *("encode", str(folder / "model"), "--input", str(corpus)),
            *("--output", str(output), "--device", "cpu"),
        )
        first = watch(command, output, kill_at=texts // 2)
        before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.npy")}
        second = watch(command, output)
        again = [name for name, at in before.items() if (output / name).stat().st_mtime_ns != at]
        if again:
            raise RuntimeError(f"{len(again)} shards were done twice, such as {again[0]}")
        worst = check_rows(folder / "model", corpus, output, texts)
    figures = {
        "texts": texts,
        "shards_when_killed": len(before),
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
    """Different texts of one to four WordNet definitions each."""
    from embedport.beir import read_beir

    definitions = list(read_beir("builtin").documents.values())
    generator = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(texts):
            picked = generator.integers(len(definitions), size=1 + i % 4)
            text = "; ".join(definitions[j] for j in picked)
            file.write(json.dumps({"_id": str(i), "text": text}) + "\n")
    return path


def watch(command: list[str], output: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Run a command, noting its memory and the rows that are done.

    Args:
        command: What to run.
        output: Where its shards appear.
        kill_at: Rows after which it is killed with signal 9.

    Returns:
        seconds; rows that this run did; memory, [seconds, resident bytes] each.
    """

    def rows() -> int:
        return sum(len(np.load(path, mmap_mode="r")) for path in output.glob("*.npy"))

    memory: list[tuple[float, int]] = []
    there = rows()
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
    return {"seconds": seconds, "rows": rows() - there, "memory": memory}


def resident_bytes(pid: int) -> int | None:
    """A process's resident set; None once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS:")), None)


def flatness(memory: list[tuple[float, int]]) -> dict[str, int]:
    """Medians of the resident set in a tenth of the run from its quarter on, and in the last."""
    values = [resident for _, resident in memory]
    tenth = max(1, len(values) // 10)
    quarter = len(values) // 4
    return {
        "bytes_at_a_quarter": int(np.median(values[quarter : quarter + tenth])),
        "bytes_at_the_end": int(np.median(values[-tenth:])),
        "peak_bytes": max(values),
    }


def check_rows(model: Path, corpus: Path, output: Path, texts: int) -> float:
    """The smallest cosine of a row to its own text's vector, over texts picked at random.

    Raises:
        RuntimeError: There is not a row for each text, or one is another text's.
    """
    import embedport

    vectors = np.concatenate([np.load(path) for path in sorted(output.glob("*.npy"))])
    if len(vectors) != texts:
        raise RuntimeError(f"{texts:,} texts, {len(vectors):,} rows")
    lines = corpus.read_text(encoding="utf-8").splitlines()
    picked = np.random.default_rng(1).choice(texts, min(CHECKED, texts), replace=False)
    embedder = embedport.load(model, device="cpu")
    assert isinstance(embedder, embedport.Embedder)
    expected = embedder.encode([json.loads(lines[i])["text"] for i in picked])
    worst = float((vectors[picked] * expected).sum(axis=1).min())
    if worst < 0.9999:
        raise RuntimeError(f"a row is not its text's: cosine {worst}")
    return worst


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Resident memory over time, the two runs one behind the other."""
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
