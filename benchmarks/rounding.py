"""Four bits on the demo pair: algorithm, groups, zero points and file format.

The same on a pair of another width, made by `benchmarks.demo --width`: loss against width.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import scratch
from .held_out import HeldOut, table_rows
from .machine import RESULTS, print_table, read_kept, save

COMPARED = ("rtn", "gptq", "gptaq")
# (groups as in a format's text, algorithm, whether attention heads are rotated); "s" is without
# zero points.
CASES = [
    *(
        (group, algorithm, rotate)
        for group in ("128", "128s")
        for rotate, algorithms in (
            (False, ("rtn", "mse", "awq", "gptq", "gptaq")),
            (True, ("rtn", "gptq", "gptaq", "awq+gptq", "awq+gptaq")),
        )
        for algorithm in algorithms
    ),
    *((group, algorithm, True) for group in ("32", "32s") for algorithm in COMPARED),
]
TABLE_FORMAT = "int8/128s"
# Rows with options of their own.
ONNX: dict[str, dict[str, Any]] = {
    "--precision int4": {"precision": "int4"},
    "--precision int4 --calibration builtin": {"precision": "int4", "calibration": "builtin"},
    "--precision int4 --group-size 32": {"precision": "int4", "group_size": 32},
    "--precision int4 --embedding-bits 4": {"precision": "int4", "embedding_bits": 4},
    "--precision int4 --rotate": {"precision": "int4", "rotate": True},
    "--precision int4 --fast": {"precision": "int4", "fast": True},
    "--precision int8-weight": {"precision": "int8-weight"},
    "--precision int8": {"precision": "int8"},
    "--precision auto --max-bytes 2600000": {"precision": "auto", "max_bytes": 2_600_000},
    "--precision auto --max-bytes 2850000": {"precision": "auto", "max_bytes": 2_850_000},
    "--precision auto --max-bytes 2850000 --calibration builtin": {
        "precision": "auto",
        "max_bytes": 2_850_000,
        "calibration": "builtin",
    },
}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "gptq --fast": {"method": "gptq", "fast": True},
    "awq": {"method": "awq"},
    "awq --symmetric": {"method": "awq", "symmetric": True},
    "awq --fast": {"method": "awq", "fast": True},
    "bnb-nf4": {"method": "bnb-nf4"},
    "bnb-nf4 --double-quant": {"method": "bnb-nf4", "double_quant": True},
    "bnb-nf4 --fast": {"method": "bnb-nf4", "fast": True},
    "bnb-int8": {"method": "bnb-int8"},
    "w8a8": {"method": "w8a8"},
    "w8a8 --fast": {"method": "w8a8", "fast": True},
    "fp8": {"method": "fp8"},
}
# The rows of pairs of other widths.
ACROSS_WIDTHS = {
    *(
        f"int4/{group}, {algorithm}, heads rotated"
        for group in ("128", "128s", "32", "32s")
        for algorithm in COMPARED
    ),
    "--precision int4",
    "--precision int8",
    "--method w8a8",
    "--method gptq",
    "--method awq",
    "--method bnb-nf4",
}
NAME = "rounding-demo"
COLUMNS = (
    "MB",
    "minimum cosine",
    "mean",
    "loss of nDCG@10",
    "from",
    "to",
    "largest score difference",
    "mean difference",
    "seconds",
)


def measure_rounding(results: Path = RESULTS, only: str = "", folder: Path | None = None) -> None:
    """Cosines and the loss of nDCG@10 on the held-out set; scores on the built-in pairs.

    Neither is in the built-in calibration set.

    Args:
        results: Where the figures are kept; rows of earlier runs stay.
        only: Run the rows whose names contain this.
        folder: A pair of another width, `embedder` and perhaps `reranker`: the rows that are
            compared across widths.
    """
    import embedport
    from embedport.demo.pipeline import builtin_embedder

    with scratch() as temporary:
        out = temporary / "out"
        pair = Pair(folder or builtin_embedder().parent, temporary)
        file = f"rounding-width-{pair.specs['embedding'].hidden_size}" if folder else NAME
        kept = read_kept(results / f"{file}.json", lambda saved: [saved["machine"]])
        figures: dict[str, dict[str, Any]] = kept.get("rows", {})

        def row(name: str, make: Any) -> None:
            if only not in name or (folder is not None and name not in ACROSS_WIDTHS):
                return
            figures[name] = pair.figures(
                lambda task: make(pair.specs[task].source.folder, out), out
            )
            print_table(["", *COLUMNS], table_rows(figures, COLUMNS))
            save(file, {"rows": figures}, results)

        for group, algorithm, rotate in CASES:
            name = f"int4/{group}, {algorithm}{', heads rotated' if rotate else ''}"
            recipe = {"algorithm": algorithm, "rotate_heads": rotate}
            row(name, by_recipe(f"int4/{group}", recipe, temporary / "recipe.json"))
        for name, options in ONNX.items():
            row(name, lambda source, out, o=options: embedport.export(source, out, **o))
        for name, options in CHECKPOINTS.items():
            row(
                f"--method {name}",
                lambda source, out, o=options: embedport.quantize_checkpoint(source, out, **o),
            )


def by_recipe(text: str, recipe: dict[str, Any], path: Path, **options: Any) -> Any:
    """A function that exports with all projections in one format, and a table of 8 bits.

    Args:
        text: The format, as a recipe writes it.
        recipe: The recipe's other keys.
        path: Where the recipe is written.
        options: Further options of the export.
    """
    import embedport
    from embedport.checkpoint.spec import ModelSpec
    from embedport.quantize.formats import TABLE, matrices

    def make(source: Path, out: Path) -> Any:
        formats = dict.fromkeys(matrices(ModelSpec.from_checkpoint(source)), text)
        path.write_text(json.dumps(recipe | {"formats": {TABLE: TABLE_FORMAT} | formats}))
        return embedport.export(source, out, recipe=path, **options)

    return make


class Pair:
    """A pair's specs and its results in fp32; or an embedder's alone."""

    def __init__(self, checkpoints: Path, folder: Path) -> None:
        import embedport
        from embedport.checkpoint.spec import ModelSpec

        places = {"embedding": checkpoints / "embedder", "reranker": checkpoints / "reranker"}
        self.specs = {
            task: ModelSpec.from_checkpoint(place)
            for task, place in places.items()
            if task == "embedding" or place.exists()
        }
        artifacts = {
            task: embedport.export(spec.source.folder, folder / task)
            for task, spec in self.specs.items()
        }
        self.held_out = HeldOut(artifacts["embedding"].folder)
        if "reranker" in self.specs:
            self.scores = self._score(artifacts["reranker"].folder)

    def figures(self, make: Any, out: Path) -> dict[str, Any]:
        """Quantize, and compare with fp32."""
        import embedport

        figures: dict[str, Any] = {}
        for task in self.specs:
            shutil.rmtree(out, ignore_errors=True)
            start = time.monotonic()
            folder = make(task).folder
            if task == "embedding":
                figures["seconds"] = round(time.monotonic() - start, 1)
                weights = (*folder.rglob("model.onnx_data"), *folder.glob("model*.safetensors"))
                figures["bytes"] = sum(path.stat().st_size for path in weights)
                embedder = embedport.load_embedder(folder, device="cpu")
                figures |= self.held_out.figures(embedder.embed_rows)
            else:
                apart = np.abs(self._score(folder) - self.scores)
                figures["largest score difference"] = float(apart.max())
                figures["mean difference"] = float(apart.mean())
        return figures

    def _score(self, folder: Path) -> np.ndarray:
        import embedport
        from embedport.texts.samples import builtin_pairs

        pairs = [(pair.query, pair.document) for pair in builtin_pairs()]
        return embedport.load_reranker(folder, device="cpu").score(pairs)
