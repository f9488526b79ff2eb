# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["openvino==2026.4.1", "nncf", "numpy"]
# ///
"""The peer: OpenVINO, in bf16 or with 8-bit weights and dynamically quantized activations.

uv run --script openvino_ir.py prepare bf16|int8 ONNX_FOLDER OUT
uv run --script openvino_ir.py serve KIND FOLDER THREADS
uv run --script openvino_ir.py warm
"""

from pathlib import Path

import serving

PACKAGES = ("openvino", "nncf")
# Dynamic quantization is on by default for 8-bit weights; its guide advises this group size.
OPTIONS = {
    "int8": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32"},
    "bf16": {"INFERENCE_PRECISION_HINT": "bf16"},
}


def prepare(kind, onnx_folder, out):
    """Convert an fp32 ONNX graph and compress its weights to 8 or 16 bits."""
    import nncf
    import openvino

    model = openvino.convert_model(next(Path(onnx_folder).rglob("*.onnx")))
    if kind == "int8":
        model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    openvino.save_model(model, Path(out) / "model.xml", compress_to_fp16=kind == "bf16")


def serve(kind, folder, threads):
    """Run the graph with OpenVINO's defaults, except for threads, bf16 and the group size."""
    import openvino

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    options = hints | OPTIONS[kind]
    model = openvino.compile_model(Path(folder) / "model.xml", "CPU", options)
    request = model.create_infer_request()
    input_names = {port.get_any_name() for port in model.inputs}

    def forward(rows):
        feeds = serving.make_feeds(rows, input_names)
        request.infer(feeds, share_inputs=True, share_outputs=True)
        return serving.last_token(request.get_output_tensor(0).data, feeds["attention_mask"])

    serving.serve_batches(forward, model.get_property("INFERENCE_NUM_THREADS"))


if __name__ == "__main__":
    serving.main(prepare, serve, PACKAGES, ("nncf", "openvino"))
