"""Matrices that stay quantized in a GPU's memory, and their products.

`matrices` has the matrices, `kernels` the products, `reading` gets both from a checkpoint.
"""
