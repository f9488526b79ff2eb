# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = ["optimum-onnx[onnxruntime]==0.1.0", "transformers<4.58", "torch==2.15.0"]
# ///
"""The peer: optimum-onnx's traced export, and onnxruntime running it.

uv run --script optimum_onnx.py prepare fp32 CHECKPOINT OUT
uv run --script optimum_onnx.py prepare int8 FP32_FOLDER OUT
uv run --script optimum_onnx.py serve KIND FOLDER THREADS
uv run --script optimum_onnx.py warm
"""

from pathlib import Path

import serving

PACKAGES = ("optimum-onnx", "transformers", "torch", "onnxruntime", "numpy")


def prepare(kind, source, out):
    """Trace and write the fp32 graph, or quantize it with optimum's AVX-512 VNNI settings."""
    if kind == "fp32":
        from optimum.exporters.onnx import main_export

        main_export(
            source,
            out,
            task="feature-extraction",
            library_name="transformers",
            device="cpu",
            do_validation=False,  # not needed, and slow
        )
        return
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    config = AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=False)
    quantizer = ORTQuantizer.from_pretrained(source, file_name="model.onnx")
    quantizer.quantize(save_dir=out, quantization_config=config, use_external_data_format=True)


def serve(kind, folder, threads):
    """Run the graph with onnxruntime's default session options, except for the threads."""
    del kind
    session = serving.open_session(next(Path(folder).rglob("*.onnx")), threads)
    input_names = {value.name for value in session.get_inputs()}

    def forward(rows):
        feeds = serving.make_feeds(rows, input_names)
        states = session.run(["last_hidden_state"], feeds)[0]
        return serving.last_token(states, feeds["attention_mask"])

    serving.serve_batches(forward, serving.threads_of(session))


if __name__ == "__main__":
    serving.main(prepare, serve, PACKAGES, ("optimum.exporters.onnx",))
