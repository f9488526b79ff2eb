"""Compile the packed kernels for a GPU that need not be here: `compile_packed.py CAPABILITY`.

Triton must not interpret: it decides on its first import.
"""

import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from embedport.runtimes.packed import kernels

TARGET = GPUTarget("cuda", int(sys.argv[1]), 32)
SIZES = {"tokens": "i32", "outputs": "i32", "width": "i32"}


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> str:
    """The PTX of a kernel; ptxas has taken it."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=TARGET, options={"enable_fp_fusion": True}).asm["ptx"]


def main() -> None:
    """Compile each kernel in the forms that it takes."""
    products = []
    for dtype, bits, group, form, tokens in (
        ("bf16", 4, 128, "zeros", 16),
        ("bf16", 4, 128, "symmetric", 64),
        ("fp16", 4, 32, "zeros", 32),
        ("bf16", 4, 64, "levels", 16),
        ("bf16", 8, 128, "symmetric", 64),
    ):
        types = {"x": f"*{dtype}", "codes": "*u8", "scales": "*fp16", "out": f"*{dtype}", **SIZES}
        constants: dict[str, Any] = {"bits": bits, "group": group}
        for name, kind in (("zeros", "*u8"), ("levels", "*fp32")):
            if name == form:
                types[name] = kind
            else:
                constants[name] = None
        blocks = {"block_tokens": tokens, "block_outputs": kernels.PACKED_OUTPUTS}
        products.append(compiled(kernels._multiply_packed, types, constants | blocks))
        blocks = {"block_outputs": kernels.UNPACKED_ROWS}
        compiled(kernels._unpack, types, constants | blocks)
    for tokens in (16, kernels.INT8_TOKENS):
        types = {"x": "*i8", "x_scales": "*fp32", "weight": "*i8", "scales": "*fp32"}
        constants = {
            "block_tokens": tokens,
            "block_outputs": kernels.INT8_OUTPUTS,
            "block_inputs": kernels.INT8_INPUTS,
            "neighbours": kernels.NEIGHBOURS,
        }
        products.append(
            compiled(kernels._multiply_int8, types | {"out": "*bf16", **SIZES}, constants)
        )
    fast = [text for text in products if "mma" in text]
    sys.stdout.write(f"tensor cores in {len(fast)} of {len(products)} products")


if __name__ == "__main__":
    main()
