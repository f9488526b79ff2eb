"""ONNX graphs of Qwen3, built from the checkpoint, not traced."""
