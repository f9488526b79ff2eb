"""A checkpoint's files: configuration, pipeline, tokenizer, weights, adapter."""
