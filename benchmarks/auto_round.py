"""AutoRound's learned rounding (arXiv:2309.05516) on the demo pair, beside ours of as many bytes.

Both round for the same formats, calibrate on all built-in texts or pairs, begin from the
checkpoint or from the same rotation of its heads, and run in the same graph.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from .calibration import builtin_rows, save_rows
from .checkpoint import scratch
from .held_out import table_rows
from .machine import RESULTS, print_table, save
from .process import run, script
from .rounding import COLUMNS, Pair, by_recipe

SCRIPT = Path(__file__).parent / "auto_round_recipe.py"
# (group size, whether groups have zero points, whether heads are rotated)
CASES = [("128", True, False), ("128", True, True), ("128", False, True), ("32", True, True)]
OURS = ("gptq", "gptaq", "awq+gptq")


def compare_with_auto_round(results: Path = RESULTS) -> None:
    """Cosines, nDCG@10 and scores of the demo pair by AutoRound's codes and by ours."""
    import embedport
    from embedport.demo.pipeline import builtin_embedder
    from embedport.exporters.texts import BUILTIN

    with scratch() as temporary:
        out = temporary / "out"
        pair = Pair(builtin_embedder().parent, temporary)
        figures: dict[str, dict[str, Any]] = {}

        def row(name: str, make: Any) -> None:
            figures[name] = pair.figures(
                lambda task: make(pair.specs[task].source.folder, out), out
            )
            print_table(["", *COLUMNS], table_rows(figures, COLUMNS))
            save("auto-round-demo", {"rows": figures}, results)

        for group, has_zero_points, rotates in CASES:
            kind = f"int4/{group}{'' if has_zero_points else 's'}"
            suffix = ", heads rotated" if rotates else ""

            def learned(
                source: Path, out: Path, case: Any = (group, has_zero_points, rotates)
            ) -> Any:
                return embedport.export(_quantize(source, temporary, *case), out, precision="int4")

            row(f"{kind}, AutoRound{suffix}", learned)
            for algorithm in OURS:
                recipe = {"algorithm": algorithm, "rotate_heads": rotates}
                path = temporary / "recipe.json"
                row(
                    f"{kind}, {algorithm}{suffix}",
                    by_recipe(kind, recipe, path, calibration=BUILTIN),
                )


def _quantize(
    source: Path, temporary: Path, group: str, has_zero_points: bool, rotates: bool
) -> Path:
    """The checkpoint with AutoRound's codes, which an export takes over."""
    folders = [temporary / name for name in ("rotated", "codes", "quantized")]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    rotated, codes, quantized = folders
    if rotates:
        _rotate_heads(source, rotated)
    rows = temporary / "rows.npz"
    save_rows(builtin_rows(source), rows)
    kind = "asymmetric" if has_zero_points else "symmetric"
    checkpoint = rotated if rotates else source
    run(script(SCRIPT, str(checkpoint), str(rows), group, kind, str(codes)))
    # AutoRound keeps nothing of sentence-transformers: the other files are the checkpoint's.
    shutil.copytree(source, quantized)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(codes / name, quantized / name)
    return quantized


def _rotate_heads(source: Path, out: Path) -> None:
    """Write the checkpoint in fp32 with the heads' rotation of a default export."""
    from safetensors.numpy import load_file, save_file

    from embedport.checkpoint.spec import ModelSpec
    from embedport.checkpoint.weights import Weights
    from embedport.quantize.rotation import RotatedHeads

    weights = RotatedHeads.seeded(Weights(ModelSpec.from_checkpoint(source)))
    shutil.copytree(source, out)
    path = out / "model.safetensors"
    tensors = {name: weights.read_fp32(name.removeprefix("model.")) for name in load_file(path)}
    path.unlink()  # the copy may be read-only
    save_file(tensors, path, metadata={"format": "pt"})
