# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["openvino==2026.4.1", "nncf", "numpy"]
# ///
"""The peer: OpenVINO with 8-bit weights and dynamic quantization of activations.

uv run --script openvino_int8.py export ONNX_FOLDER OUT
uv run --script openvino_int8.py serve FOLDER
uv run --script openvino_int8.py vectors GRAPH ROWS OUT
uv run --script openvino_int8.py warm
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("openvino", "nncf")


def export(onnx_folder: str, out: str) -> None:
    """Compress an fp32 ONNX graph's weights to 8 bits."""
    import nncf
    import openvino

    model = openvino.convert_model(next(Path(onnx_folder).rglob("*.onnx")))
    model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    Path(out).mkdir()
    openvino.save_model(model, Path(out) / "model.xml", compress_to_fp16=False)


def warm() -> None:
    """Install and import everything, and tell the versions."""
    import nncf  # noqa: F401
    import openvino  # noqa: F401

    print(json.dumps({name: version(name) for name in PACKAGES}), flush=True)


def vectors(graph: str, rows: str, out: str) -> None:
    """Run an ONNX graph as it is, each row of token ids by itself, and tell the versions."""
    import numpy as np
    import openvino

    model = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    with np.load(rows) as arrays:
        for name in arrays.files:
            ids = arrays[name][None]
            found.append(model({"input_ids": ids, "attention_mask": np.ones_like(ids)})[0][0])
    np.save(out, np.stack(found))
    print(json.dumps({"openvino": version("openvino")}))


def serve(folder: str) -> None:
    """Answer each line {"ids": FILE.npz, "vectors": FILE.npy, "repeats": N} with seconds."""
    import numpy as np
    import openvino

    # Everything as OpenVINO chooses it, bf16 arithmetic and dynamic quantization included.
    model = openvino.compile_model(
        Path(folder) / "model.xml",
        "CPU",
        {"PERFORMANCE_HINT": "LATENCY", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    )
    request_ = model.create_infer_request()
    wanted = {port.get_any_name() for port in model.inputs}
    threads = model.get_property("INFERENCE_NUM_THREADS")
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
            request_.infer(feeds, share_inputs=True, share_outputs=True)
            hidden = request_.get_output_tensor(0).data
            vectors = hidden[np.arange(len(ids)), mask.sum(axis=1) - 1]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        seconds = time.perf_counter() - start
        np.save(request["vectors"], vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    {"export": export, "serve": serve, "vectors": vectors, "warm": warm}[verb](*arguments)
