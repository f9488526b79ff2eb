# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "onnxruntime-genai==0.12.2",
#     "transformers==4.52.4",
#     "torch==2.15.0",
#     "onnx-ir",
#     "accelerate",
# ]
# ///
"""The peer: onnxruntime-genai's model builder in 4 bits, and onnxruntime running its graph.

uv run --script onnxruntime_genai_.py prepare int4 CHECKPOINT OUT
uv run --script onnxruntime_genai_.py serve KIND FOLDER THREADS
uv run --script onnxruntime_genai_.py warm
"""

import tempfile
from pathlib import Path

import serving

PACKAGES = ("onnxruntime-genai", "transformers", "torch", "onnxruntime", "numpy")
# Rounded to nearest in groups of 32, activations to 8 bits: what the builder does in 4 bits by
# default for generation. The table of embeddings stays fp32.
OPTIONS = {"int4_block_size": 32, "int4_accuracy_level": 4}


def prepare(kind, checkpoint, out):
    """Build the graph that ends with the final norm."""
    from onnxruntime_genai.models.builder import create_model

    with tempfile.TemporaryDirectory(dir=Path(out).parent) as cache:
        create_model(
            checkpoint, checkpoint, out, kind, "cpu", cache, exclude_lm_head=True, **OPTIONS
        )


def serve(kind, folder, threads):
    """Run the graph with onnxruntime's default session options, except for the threads."""
    del kind
    import numpy as np

    session = serving.open_session(Path(folder) / "model.onnx", threads)
    past = [value for value in session.get_inputs() if value.name.startswith("past_key_values")]

    def forward(rows):
        ids, mask = serving.pad(rows)
        feeds = {"input_ids": ids, "attention_mask": mask}
        for value in past:
            _, heads, _, width = value.shape
            feeds[value.name] = np.zeros((len(rows), heads, 0, width), np.float32)
        return serving.last_token(session.run(["hidden_states"], feeds)[0], mask)

    serving.serve_batches(forward, serving.threads_of(session))


if __name__ == "__main__":
    serving.main(prepare, serve, PACKAGES, ("onnxruntime_genai.models.builder",))
