"""How the demo pair is made: `python -m benchmarks.demo`."""
