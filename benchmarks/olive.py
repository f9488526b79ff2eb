"""Microsoft's Olive recipe for Qwen3-Embedding, beside our exports of as many bytes.

The recipe takes its calibration texts from the hub; here it gets all built-in ones, as ours of as
many bytes does too; others of ours take the part that is the default. The loss of one run says
little, since roundings that are equally good lose differently: so the mixture is calibrated four
more times, without a quarter of the texts each, and ours is rounded in more random bases.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from embedport.artifact.folder import Artifact

from .calibration import builtin_rows, save_rows
from .checkpoint import scratch
from .held_out import Embed, HeldOut, table_rows
from .machine import RESULTS, print_table, save
from .process import run, script

SCRIPT = Path(__file__).parent / "olive_recipe.py"
RECIPES = {
    "Olive: 35 % of the weights at 8 bits, the rest GPTQ/128": ("mixed", 128),
    "Olive: GPTQ/128": ("gptq", 128),
    "Olive: GPTQ/32": ("gptq", 32),
}
# What onnxruntime-genai stores once more: tables of cosines and sines for all positions.
CACHES = ("cos_cache", "sin_cache")
BATCH_ROWS = 64
# Further runs: of the recipe, each without one part of the texts; of ours, with these seeds.
PARTS, SEEDS = 4, range(1, 9)
COLUMNS = ("MB", "minimum cosine", "mean", "loss of nDCG@10", "from", "to", "seconds")


def compare_with_olive(results: Path = RESULTS) -> None:
    """The demo embedder by Olive's recipe and by ours: size, cosines to fp32, nDCG@10."""
    import embedport
    from embedport.demo.pipeline import builtin_embedder
    from embedport.exporters.texts import BUILTIN
    from embedport.files import MANIFEST

    source = builtin_embedder()
    with scratch() as folder:
        held_out = HeldOut(embedport.export(source, folder / "fp32").folder)
        rows = builtin_rows(source)
        figures: dict[str, dict[str, Any]] = {}

        def add(name: str, seconds: float, size: int, embed: Embed) -> None:
            figures[name] = held_out.figures(embed) | {"bytes": size, "seconds": round(seconds, 1)}
            print_table(["", *COLUMNS], table_rows(figures, COLUMNS))

        def build(name: str, kind: str, group: int, texts: Sequence[np.ndarray]) -> None:
            out = folder / f"olive-{len(figures)}"
            calibration = out.with_suffix(".npz")
            save_rows(texts, calibration)
            arguments = (kind, str(group), str(source), str(calibration), str(out))
            seconds = run(script(SCRIPT, *arguments)).seconds
            model = out / "model.onnx"
            add(name, seconds, graph_bytes(model), _graph(model))

        def export(name: str, **options: Any) -> Artifact:
            start = time.monotonic()
            artifact = embedport.export(source, folder / name.replace(" ", ""), **options)
            seconds = time.monotonic() - start
            embedder = embedport.load_embedder(artifact.folder, device="cpu")
            add(f"embedport {name}", seconds, graph_bytes(artifact.graph), embedder.embed_rows)
            return artifact

        for name, (kind, group) in RECIPES.items():
            build(name, kind, group, rows)
        mixture = next(iter(RECIPES))
        budget = figures[mixture]["bytes"]
        size = f"--precision auto --max-bytes {budget}"
        export(size, precision="auto", max_bytes=budget)
        mixed = export(
            f"{size} --calibration {BUILTIN}",
            precision="auto",
            max_bytes=budget,
            calibration=BUILTIN,
        )
        export("--precision int4", precision="int4")
        export("--precision int4 --group-size 32", precision="int4", group_size=32)
        for part in range(PARTS):
            others = [row for i, row in enumerate(rows) if i % PARTS != part]
            build(f"{mixture}, texts without part {part}", *RECIPES[mixture], others)
        recipe = json.loads((mixed.folder / MANIFEST).read_text())["recipe"]
        for seed in SEEDS:
            file = folder / f"seed-{seed}.json"
            file.write_text(json.dumps(recipe | {"seed": seed}))
            export(f"{size} --calibration {BUILTIN}, seed {seed}", recipe=file, calibration=BUILTIN)
        save("olive-demo", {"rows": figures}, results)


def graph_bytes(model: Path) -> int:
    """Bytes of a graph's weights, each stored once, without tables of cosines and sines."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    sizes = {
        tensor.name: int(np.prod(tensor.dims, dtype=np.int64))
        * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.name not in CACHES
    }
    return sum(sizes.values())


def _graph(model: Path) -> Embed:
    """Run onnxruntime-genai's graph: rows of equal length together, so that nothing is padded."""
    import onnxruntime as ort

    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    past = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]

    def embed(rows: Sequence[np.ndarray]) -> np.ndarray:
        vectors: list[np.ndarray] = [np.empty(0)] * len(rows)
        by_length: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            by_length.setdefault(len(row), []).append(i)
        for group in by_length.values():
            for start in range(0, len(group), BATCH_ROWS):
                batch = group[start : start + BATCH_ROWS]
                ids = np.stack([rows[i] for i in batch])
                feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
                for value in past:
                    feeds[value.name] = np.zeros(
                        (len(batch), value.shape[1], 0, value.shape[3]), np.float32
                    )
                states = np.asarray(session.run(["hidden_states"], feeds)[0])[:, -1]
                states /= np.linalg.norm(states, axis=1, keepdims=True)
                for i, vector in zip(batch, states, strict=True):
                    vectors[i] = vector
        return np.stack(vectors)

    return embed
