"""The machine: its CPU, its GPU, and the TensorRT engines that it runs."""
