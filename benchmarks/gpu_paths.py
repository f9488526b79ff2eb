"""Every way to run an embedding checkpoint on a GPU, ours and others; one per process.

    python -m benchmarks.gpu_paths NAME CHECKPOINT INPUTS.npz FOLDER

Prints one line of JSON. Writes the vectors of the parity texts to FOLDER/vectors.npy, and the
results of the shipped demo pair to FOLDER/embedding.npy and FOLDER/reranker.npy.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import embedport
from embedport.checkpoint.spec import Task
from embedport.demo.pipeline import builtin_embedder, builtin_reranker
from embedport.errors import DeviceError, MissingPackageError
from embedport.exporters.tensorrt import obstacle
from embedport.exporters.tensorrt.options import BUILDERS, Target
from embedport.machine.gpu import call
from embedport.runtimes.batching import run_batches
from tests.synthetic import round_to_nearest

# (input_ids, attention_mask), int64 [rows, tokens], right-padded, to float32 [rows, dim].
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
MIX_TOKENS = 16_384
WARM_UPS = 3  # a shape must repeat this often before it becomes a CUDA graph
SECONDS, REPEATS = 1.0, 3
SAMPLE_SECONDS = 0.02


class NotRunError(Exception):
    """A path cannot run here; the message says why."""


def _transformers(attention: str) -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        import torch
        from transformers import AutoModel

        model = AutoModel.from_pretrained(
            checkpoint, dtype=torch.float16, attn_implementation=attention
        ).cuda()

        def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                states = model(
                    input_ids=torch.from_numpy(ids).cuda(),
                    attention_mask=torch.from_numpy(mask).cuda(),
                    use_cache=False,
                ).last_hidden_state
                last = torch.from_numpy(mask.sum(axis=1) - 1).cuda()
                vectors = states[torch.arange(len(ids)).cuda(), last].float()
                return torch.nn.functional.normalize(vectors, dim=1).cpu().numpy()

        return run

    return open_path


def _sentence_transformers(checkpoint: Path, folder: Path) -> Run:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(checkpoint), device="cuda", model_kwargs={"dtype": torch.float16}
    )

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        features: dict[str, Any] = {
            "input_ids": torch.from_numpy(ids).cuda(),
            "attention_mask": torch.from_numpy(mask).cuda(),
        }
        with torch.inference_mode():
            return model(features)["sentence_embedding"].float().cpu().numpy()

    return run


def _vllm(checkpoint: Path, folder: Path) -> Run:
    from vllm import LLM  # ty: ignore[import-not-found] (where it installs)

    model = LLM(
        str(checkpoint),
        runner="pooling",
        dtype="float16",
        # Batches are repeated: with the cache they would cost nothing.
        enable_prefix_caching=False,
        # Its share of the GPU's memory; the model is opened twice.
        gpu_memory_utilization=0.4,
    )

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = zip(ids, mask, strict=True)
        prompts = [{"prompt_token_ids": row[: real.sum()].tolist()} for row, real in rows]
        outputs = model.embed(prompts, use_tqdm=False)
        return np.asarray([output.outputs.embedding for output in outputs], np.float32)

    return run


def _torch(prepare: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        out = folder / "artifact"
        return embedport.load(
            out if out.exists() else prepare(checkpoint, out), device="cuda"
        ).model

    return open_path


def _as_stored(checkpoint: Path, out: Path) -> Path:
    return checkpoint


def _in_fp16(checkpoint: Path, out: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out)
    for path in out.glob("*.safetensors"):
        tensors = {name: tensor.to(torch.float16) for name, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    return out


def _quantized(method: str, *, fast: bool = False) -> Callable[[Path, Path], Path]:
    def prepare(checkpoint: Path, out: Path) -> Path:
        return embedport.quantize_checkpoint(checkpoint, out, method=method, fast=fast).folder

    return prepare


def _in_w4a16(checkpoint: Path, out: Path) -> Path:
    # Rounded to nearest: calibration would take longer than the device is lent for.
    task = "reranker" if checkpoint == PAIR["reranker"] else "embedding"
    return round_to_nearest(checkpoint, out, "awq", task)


def _onnxruntime(device: str, dialect: str, **options: Any) -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        if device == "tensorrt" and (reason := obstacle("tensorrt")):
            raise NotRunError(reason)
        out = folder / "artifact"
        if not out.exists():
            embedport.export(checkpoint, out, dialect=dialect, **options)
        return embedport.load(out, device=device).model

    return open_path


def _tensorrt(precision: str, target: Target = "this-gpu") -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        if reason := obstacle(BUILDERS[target]):
            raise NotRunError(reason)
        out, graph = folder / "artifact", folder / "graph"
        options: dict[str, Any] = {"format": "tensorrt", "target": target}
        if out.exists():
            pass
        elif precision == "int4":  # calibration would take longer than the device is lent for
            fast: dict[str, Any] = {"fast": True, "arithmetic": "bf16", "dialect": "standard"}
            embedport.export(checkpoint, graph, precision=precision, **fast)
            embedport.export(graph, out, **options)
        else:
            embedport.export(checkpoint, out, precision=precision, **options)
        return embedport.load(out, device="cuda").model

    return open_path


REFERENCE = "transformers fp16, SDPA"
PATHS: dict[str, Callable[[Path, Path], Run]] = {
    REFERENCE: _transformers("sdpa"),
    "embedport torch": _torch(_as_stored),
    "embedport torch fp16": _torch(_in_fp16),
    "embedport torch fp8": _torch(_quantized("fp8")),
    "embedport torch W8A8": _torch(_quantized("w8a8", fast=True)),
    "embedport torch W4A16": _torch(_in_w4a16),
    "embedport torch NF4": _torch(_quantized("bnb-nf4")),
    "embedport onnxruntime CUDA fp16": _onnxruntime("cuda", "ort", precision="fp16"),
    "sentence-transformers fp16": _sentence_transformers,
    "embedport onnxruntime CUDA bf16": _onnxruntime("cuda", "ort", precision="bf16"),
    "embedport onnxruntime CUDA int4": _onnxruntime(
        "cuda", "ort", precision="int4", arithmetic="bf16", fast=True
    ),
    "transformers fp16, FlashAttention 2": _transformers("flash_attention_2"),
    "vLLM fp16, pooling": _vllm,
    "embedport onnxruntime TensorRT bf16": _onnxruntime("tensorrt", "standard", precision="bf16"),
    **{f"embedport TensorRT {kind}": _tensorrt(kind) for kind in ("fp16", "bf16", "fp8", "int8")},
    "embedport TensorRT int4": _tensorrt("int4"),
    **{f"embedport TensorRT for RTX {kind}": _tensorrt(kind, "rtx") for kind in ("bf16", "fp8")},
}
PAIR: dict[Task, Path] = {"embedding": builtin_embedder(), "reranker": builtin_reranker()}


class Memory:
    """Samples the largest growth of the GPU's used memory, over all processes."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._before = self._used()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop sampling and return the growth in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak

    def _watch(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, self._used() - self._before)

    def _used(self) -> int:
        free, total = call("cudaMemGetInfo")
        return int(total - free)


def measure(name: str, checkpoint: Path, inputs: Path, folder: Path) -> dict[str, Any]:
    """Measure one path and return its row.

    Args:
        name: The path's name in `PATHS`.
        checkpoint: The checkpoint.
        inputs: File of token ids, from `benchmarks.gpu`.
        folder: Folder for artifacts and vectors.
    """
    arrays = np.load(inputs)
    memory = Memory()
    start = time.perf_counter()
    try:
        run = PATHS[name](checkpoint, folder)  # exports and builds if necessary
        run(*_full(arrays["1x32"]))
        prepared = time.perf_counter() - start
        del run
        start = time.perf_counter()
        run = PATHS[name](checkpoint, folder)
        loaded = _allocated()
        run(*_full(arrays["1x32"]))
        start_up = time.perf_counter() - start
    except (NotRunError, MissingPackageError, DeviceError, ImportError) as error:
        return {"status": "not run", "reason": " ".join(str(error).split())}
    np.save(folder / "vectors.npy", _together(run, _rows(arrays, "text")))
    speeds: dict[str, Any] = {}
    for shape in (key for key in arrays.files if "x" in key and "_" not in key):
        batch = _full(arrays[shape])
        speeds[shape] = _speed(lambda batch=batch: run(*batch), batch[0].size)
    rows = _rows(arrays, "mix")
    speeds["mix"] = _speed(lambda: _together(run, rows), sum(map(len, rows)))
    peak = memory.stop()
    if name == REFERENCE or name.startswith("embedport"):
        _run_pair(name, arrays, folder)
    return {
        "status": "run",
        "first_start_seconds": round(prepared, 2),
        "start_up_seconds": round(start_up, 2),
        "tokens_per_second": speeds,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
    }


def _allocated() -> int | None:
    """Bytes of torch's tensors on the GPU; None without torch."""
    if "torch" not in sys.modules:
        return None
    import torch

    return torch.cuda.memory_allocated()


def _run_pair(name: str, arrays: Any, folder: Path) -> None:
    """Save vectors and scores of the demo pair; the reference uses the model cards' own code."""
    from embedport.checkpoint.spec import ModelSpec
    from embedport.validation.card import CardReference

    for task, checkpoint in PAIR.items():
        rows = _rows(arrays, task)
        if name == REFERENCE:
            reference = CardReference(
                ModelSpec.from_checkpoint(checkpoint, task=task), None, "cuda"
            )
            results = reference.run_rows([row.tolist() for row in rows], "fp16")
        else:
            place = folder / task
            place.mkdir()
            results = _together(PATHS[name](checkpoint, place), rows)
        np.save(folder / f"{task}.npy", results)


def _rows(arrays: Any, name: str) -> list[np.ndarray]:
    return np.split(arrays[f"{name}_ids"], np.cumsum(arrays[f"{name}_lengths"])[:-1])


def _together(run: Run, rows: list[np.ndarray]) -> np.ndarray:
    """Run all rows in batches sorted by length, as `encode` does."""
    width = run(*_full(rows[0][None])).shape[1:]
    return run_batches(run, rows, width, batch_tokens=MIX_TOKENS, description="", progress=False)


def _full(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids, np.ones_like(ids)


def _speed(run: Callable[[], object], tokens: int) -> float | str:
    """Median tokens per second over a few seconds, or the reason why this shape does not run."""
    try:
        for _ in range(WARM_UPS):
            run()
        seconds: list[float] = []
        while sum(seconds) < SECONDS or len(seconds) < REPEATS:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    except Exception as error:  # out of memory has a class of its own in every library
        return f"not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return round(tokens / float(np.median(seconds)), 1)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(Path, sys.argv[2:]))), flush=True)
