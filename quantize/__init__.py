"""Quantization: schemes and algorithms, independent of any output format."""
