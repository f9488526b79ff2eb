"""Every way to run an embedding checkpoint on a GPU, ours and others', a process each.

    python -m benchmarks.gpu_paths NAME CHECKPOINT INPUTS.npz FOLDER

Prints a line of JSON, and writes FOLDER/vectors.npy: what it gives for the texts of parity.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import embedport
from embedport.errors import DeviceError, MissingPackageError
from embedport.exporters.tensorrt import obstacle
from embedport.gpu import call
from embedport.runtimes.batching import run_batches

# (input_ids, attention_mask), int64 [rows, tokens], right-padded, to float32 [rows, dim].
Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
MIX_TOKENS = 16_384
WARM_UPS = 4  # one more than a repeated shape needs to become a CUDA graph
SECONDS, REPEATS = 2.0, 5
SAMPLE_SECONDS = 0.02


class NotRunError(Exception):
    """A path cannot run here, with the reason."""


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

    model = LLM(str(checkpoint), runner="pooling", dtype="float16", enforce_eager=False)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        rows = zip(ids, mask, strict=True)
        prompts = [{"prompt_token_ids": row[: real.sum()].tolist()} for row, real in rows]
        found = model.embed(prompts, use_tqdm=False)
        return np.asarray([each.outputs.embedding for each in found], np.float32)

    return run


def _torch(checkpoint: Path, folder: Path) -> Run:
    return embedport.load(checkpoint, device="cuda").model


def _onnxruntime(device: str, dialect: str, **options: str) -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        out = folder / "artifact"
        if not out.exists():
            embedport.export(checkpoint, out, dialect=dialect, **options)
        return embedport.load(out, device=device).model

    return open_path


def _tensorrt(precision: str) -> Callable[[Path, Path], Run]:
    def open_path(checkpoint: Path, folder: Path) -> Run:
        if reason := obstacle():
            raise NotRunError(reason)
        out = folder / "artifact"
        if not out.exists():
            embedport.export(checkpoint, out, format="tensorrt", precision=precision)
        return embedport.load(out, device="cuda").model

    return open_path


REFERENCE = "transformers fp16, SDPA"
PATHS: dict[str, Callable[[Path, Path], Run]] = {
    REFERENCE: _transformers("sdpa"),
    "transformers fp16, FlashAttention 2": _transformers("flash_attention_2"),
    "sentence-transformers fp16": _sentence_transformers,
    "vLLM fp16, pooling": _vllm,
    "embedport torch": _torch,
    "embedport onnxruntime CUDA fp16": _onnxruntime("cuda", "ort", precision="fp16"),
    "embedport onnxruntime CUDA bf16": _onnxruntime("cuda", "ort", precision="bf16"),
    "embedport onnxruntime CUDA int4": _onnxruntime(
        "cuda", "ort", precision="int4", arithmetic="bf16"
    ),
    "embedport onnxruntime TensorRT bf16": _onnxruntime("tensorrt", "standard", precision="bf16"),
    **{f"embedport TensorRT {each}": _tensorrt(each) for each in ("fp16", "bf16", "fp8", "int8")},
    "embedport TensorRT int4": _tensorrt("int4"),
}


class Memory:
    """The most that the GPU's memory grew by, of all processes, while this one was watching."""

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._before = self._used()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """End watching: bytes."""
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
    """One path's row.

    Args:
        name: Of `PATHS`.
        checkpoint: The checkpoint.
        inputs: The token ids: see benchmarks.gpu.
        folder: Where artifacts and vectors go.
    """
    arrays = np.load(inputs)
    rows = np.split(arrays["mix_ids"], np.cumsum(arrays["mix_lengths"])[:-1])
    texts = np.split(arrays["text_ids"], np.cumsum(arrays["text_lengths"])[:-1])
    start = time.perf_counter()
    try:
        run = PATHS[name](checkpoint, folder)  # exports and builds where that has to be done
        run(*_full(arrays["1x32"]))
        prepared = time.perf_counter() - start
        del run
        memory = Memory()
        start = time.perf_counter()
        run = PATHS[name](checkpoint, folder)
        run(*_full(arrays["1x32"]))
        start_up = time.perf_counter() - start
    except (NotRunError, MissingPackageError, DeviceError, ImportError) as error:
        return {"status": "not run", "reason": " ".join(str(error).split())}
    width = run(*_full(arrays["1x32"])).shape[1:]

    def together(rows: list[np.ndarray]) -> np.ndarray:
        return run_batches(
            run, rows, width, batch_tokens=MIX_TOKENS, description=name, progress=False
        )

    np.save(folder / "vectors.npy", together(texts))
    speeds: dict[str, Any] = {}
    for shape in (key for key in arrays.files if "x" in key and "_" not in key):
        batch = _full(arrays[shape])
        speeds[shape] = _speed(lambda batch=batch: run(*batch), batch[0].size)
    speeds["mix"] = _speed(lambda: together(rows), int(arrays["mix_lengths"].sum()))
    return {
        "status": "run",
        "first_start_seconds": round(prepared, 2),
        "start_up_seconds": round(start_up, 2),
        "tokens_per_second": speeds,
        "peak_bytes": memory.stop(),
    }


def _full(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return ids, np.ones_like(ids)


def _speed(run: Callable[[], object], tokens: int) -> float | str:
    """The median over a few seconds; the reason where it does not run at that shape."""
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
