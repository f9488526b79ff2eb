# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["optimum-onnx[onnxruntime]==0.1.0", "transformers<4.58", "torch==2.15.0"]
# ///
"""The peer: optimum-onnx's traced export, and onnxruntime running it.

uv run --script optimum_onnx.py export CHECKPOINT OUT
uv run --script optimum_onnx.py serve FOLDER THREADS
uv run --script optimum_onnx.py warm
"""

import json
import sys
import time
from pathlib import Path


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


def serve(folder: str, threads: int) -> None:
    """Answer each line {"ids": FILE.npz} with the seconds of one run; vectors go beside the ids."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    graph = next(Path(folder).rglob("*.onnx"))
    session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    wanted = {value.name for value in session.get_inputs()}
    print(json.dumps({"ready": sorted(wanted)}), flush=True)
    for line in sys.stdin:
        path = json.loads(line)["ids"]
        arrays = np.load(path)
        ids, mask = arrays["input_ids"], arrays["attention_mask"]
        feeds = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in wanted:
            feeds["position_ids"] = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
        start = time.perf_counter()
        hidden = session.run(["last_hidden_state"], feeds)[0]
        vectors = hidden[np.arange(len(ids)), mask.sum(axis=1) - 1]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        seconds = time.perf_counter() - start
        np.save(Path(path).with_suffix(".peer.npy"), vectors)
        print(json.dumps({"seconds": seconds}), flush=True)


if __name__ == "__main__":
    verb, *arguments = sys.argv[1:]
    if verb == "export":
        export(*arguments)
    elif verb == "serve":
        serve(arguments[0], int(arguments[1]))
    else:
        import optimum.exporters.onnx  # noqa: F401 (installs and imports, nothing else)
