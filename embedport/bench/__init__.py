"""Benchmarks of artifacts against each other and against peers, with interleaved rounds."""
