"""int8 at the 0.6B geometry, on a checkpoint with outliers as large as those of Qwen models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np

from .checkpoint import checkpoint, scratch
from .machine import RESULTS, print_table, save
from .process import export_ours, ours, run

MAGNITUDE = 3000.0
LONGEST = 400  # characters: enough tokens to hold outliers, few enough for a CPU
WAYS = ("int8", "int8 --no-rotate", "onnxruntime dynamic int8 of our fp32 graph")


def compare_with_dynamic_int8(results: Path = RESULTS) -> None:
    """Compare our int8, with and without rotation, and onnxruntime's dynamic int8.

    Cosines are with the vectors of the fp32 graph, which dynamic int8 quantizes.
    """
    with scratch() as folder:
        planted = folder / "checkpoint"
        shutil.copytree(checkpoint("0.6b"), planted)
        _child("plant", str(planted))
        export_ours(planted, folder, "fp32")
        vectors = {"fp32": _child("encode", str(folder / "fp32"), str(folder / "fp32.npy"))}
        for name, options in (("int8", []), ("int8 --no-rotate", ["--no-rotate"])):
            out = folder / name.replace(" --", "-")
            arguments = ["export", "onnx", str(planted), "-o", str(out), "--precision", "int8"]
            run(ours(*arguments, *options))
            vectors[name] = _child("encode", str(out), str(folder / "vectors.npy"))
        vectors[WAYS[-1]] = _child("dynamic", str(folder / "fp32"), str(folder / "vectors.npy"))
    figures = {}
    for name in WAYS:
        with np.errstate(invalid="ignore"):
            cosines = (vectors[name] * vectors["fp32"]).sum(axis=1)
        nonfinite = int((~np.isfinite(cosines)).sum())
        cosines = cosines[np.isfinite(cosines)]
        figures[name] = {
            "minimum_cosine": float(cosines.min()) if len(cosines) else None,
            "mean_cosine": float(cosines.mean()) if len(cosines) else None,
            "nonfinite": nonfinite,
        }
    print_table(
        ["outliers planted", "minimum cosine", "mean cosine", "NaN"],
        [[name, *row.values()] for name, row in figures.items()],
    )
    save(
        "outliers-0.6b-int8",
        {"magnitude": MAGNITUDE, "texts": len(vectors["fp32"]), "ways": figures},
        results,
    )


def _child(verb: str, *arguments: str) -> np.ndarray:
    """Run one step in a process of its own, and read the vectors it wrote, if any."""
    run([sys.executable, "-m", "benchmarks.outliers", verb, *arguments])
    return np.load(arguments[1]) if len(arguments) > 1 else np.empty(0)


def _texts() -> list[str]:
    from embedport.texts.samples import builtin_samples

    return [sample.text for sample in builtin_samples() if len(sample.text) <= LONGEST]


def _encode(folder: str, path: str) -> None:
    import embedport

    np.save(path, embedport.load_embedder(folder, device="cpu").encode(_texts()))


def _dynamic(folder: str, path: str) -> None:
    """Quantize the artifact's graph with `quantize_dynamic` and encode with the same Embedder."""
    import onnxruntime
    from onnxruntime.quantization import quantize_dynamic

    import embedport

    embedder = embedport.load_embedder(folder, device="cpu")
    assert embedder.artifact is not None
    with scratch() as temporary:
        graph = temporary / "model.onnx"
        quantize_dynamic(embedder.artifact.graph, graph, use_external_data_format=True)
        session = onnxruntime.InferenceSession(graph)
        embedder.model = lambda ids, mask: np.asarray(
            session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        )
        np.save(path, embedder.encode(_texts()))


def _plant(folder: str) -> None:
    from tests.synthetic import plant_outliers

    plant_outliers(Path(folder), magnitude=MAGNITUDE)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    {"plant": _plant, "encode": _encode, "dynamic": _dynamic}[verb](*arguments)
    print(json.dumps({"done": verb}))
