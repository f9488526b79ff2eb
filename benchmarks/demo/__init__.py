"""Training of the demo embedder and reranker: `python -m benchmarks.demo`."""
