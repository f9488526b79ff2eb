# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["optimum-onnx[onnxruntime]==0.1.0", "transformers<4.58", "torch==2.15.0"]
# ///
"""The peer: optimum-onnx's traced export, and onnxruntime running it.

uv run --script optimum_onnx.py export CHECKPOINT OUT
uv run --script optimum_onnx.py quantize FOLDER OUT
uv run --script optimum_onnx.py serve FOLDER
uv run --script optimum_onnx.py warm
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("optimum-onnx", "transformers", "torch", "onnxruntime", "numpy")


def export(checkpoint: str, out: str) -> None:
    """Trace and write the fp32 graph."""
    from optimum.exporters.onnx import main_export

    main_export(
        checkpoint,
        out,
        task="feature-extraction",
        library_name="transformers",
        device="cpu",
        do_validation=False,  # its own check would only add to its time
    )


def quantize(folder: str, out: str) -> None:
    """Onnxruntime's dynamic int8 of an fp32 graph, as optimum configures it for AVX-512 VNNI."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    quantizer = ORTQuantizer.from_pretrained(folder, file_name="model.onnx")
    quantizer.quantize(save_dir=out, quantization_config=config, use_external_data_format=True)


def warm() -> None:
    """Install and import everything, and tell the versions."""
    import optimum.exporters.onnx  # noqa: F401 (its import is what is slow the first time)

    print(json.dumps({name: version(name) for name in PACKAGES}), flush=True)


def serve(folder: str) -> None:
    """Answer each line {"ids": FILE.npz, "vectors": FILE.npy, "repeats": N} with seconds.

    Session options are the defaults, as on our side: a thread count
    of one's own, even the same, turns off onnxruntime's pinning of threads to cores.
    """
    import numpy as np
    import onnxruntime as ort

    graph = next(Path(folder).rglob("*.onnx"))
    before = len(list(Path("/proc/self/task").iterdir()))
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    threads = len(list(Path("/proc/self/task").iterdir())) - before + 1
    wanted = {value.name for value in session.get_inputs()}
    print(json.dumps({"inputs": sorted(wanted), "threads": threads}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        arrays = np.load(request["ids"])
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in wanted:
            feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        start = time.perf_counter()
        for _ in range(request["repeats"]):
            hidden = session.run(["last_hidden_state"], feeds)[0]
            vectors = hidden[np.arange(len(ids)), mask.sum(axis=1) - 1]
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        seconds = time.perf_counter() - start
        np.save(request["vectors"], vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    {"export": export, "quantize": quantize, "serve": serve, "warm": warm}[verb](*arguments)
