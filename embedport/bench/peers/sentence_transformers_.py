# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "sentence-transformers[onnx]<6",
#     "optimum-onnx[onnxruntime]==0.1.0",
#     "transformers<4.58",
#     "torch==2.15.0",
# ]
# ///
"""The peer: sentence-transformers, in torch with bf16, or its ONNX backend on optimum's graph.

uv run --script sentence_transformers_.py prepare onnx CHECKPOINT OUT
uv run --script sentence_transformers_.py serve bf16|onnx FOLDER THREADS
uv run --script sentence_transformers_.py warm
"""

import serving

PACKAGES = ("sentence-transformers", "optimum-onnx", "transformers", "torch", "onnxruntime")


def prepare(kind, checkpoint, out):
    """Export the checkpoint with the ONNX backend and save the result."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        checkpoint,
        backend=kind,
        model_kwargs={"provider": "CPUExecutionProvider", "export": True},
    )
    model.save_pretrained(out)


def serve(kind, folder, threads):
    """Run the model on token ids, as `encode` does after its tokenizer."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_grad_enabled(False)
    torch.set_num_threads(int(threads))
    used = torch.get_num_threads()
    if kind == "onnx":
        import onnxruntime as ort

        session_options = ort.SessionOptions()
        session_options.intra_op_num_threads = serving.session_threads(int(threads))
        options = {"provider": "CPUExecutionProvider", "session_options": session_options}
        model = SentenceTransformer(folder, backend="onnx", model_kwargs=options, device="cpu")
        used = max(used, serving.threads_of(model[0].auto_model.session))
    else:
        options = {"torch_dtype": torch.bfloat16}
        model = SentenceTransformer(folder, model_kwargs=options, device="cpu")

    def forward(rows):
        ids, mask = map(torch.from_numpy, serving.pad(rows))
        vectors = model({"input_ids": ids, "attention_mask": mask})["sentence_embedding"]
        return vectors.float().numpy()

    serving.serve_batches(forward, used)


if __name__ == "__main__":
    serving.main(prepare, serve, PACKAGES, ("sentence_transformers",))
