"""How the demo embedder is made: `python -m benchmarks.demo`."""
