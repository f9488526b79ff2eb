"""The Qwen3 graph in ONNX: layers, dialects, pooling, initializers."""
