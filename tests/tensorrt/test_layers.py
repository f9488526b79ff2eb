"""A builder's log of an engine's layers, in lines of TensorRT for RTX 1.7.1."""

import pytest

from embedport.exporters.tensorrt.layers import (
    Layer,
    compare_products,
    computed_products,
    count_products,
    read_layers,
)

ROW = "Dimensions: [-1,64], Strides: [64,1], StrideOrder: [1,0], Datatype"
REST = "Format: (Linear) Row major linear format }"
SCALAR = f"{{ Name: alpha, Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, {REST}"


def line(kind, inputs, constants, nodes=("layers.0/MatMul_1",), name="a+b_myl1_3"):
    tensors = [
        ", ".join([*(f"{{ Name: t, {ROW}: {each}, {REST}" for each in types), SCALAR])
        for types in (inputs, constants)
    ]
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensors[0]}], Constants: [ {tensors[1]}], "
        f"Outputs: [ {{ Name: o, {ROW}: BFloat16, {REST}], TacticName: , StreamId: 0, "
        f"Metadata: {metadata}"
    )


def test_a_line():
    text = "\n".join(
        [
            "Layers:",
            "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: []",
            line("gemm", ["Int8"], ["Int8"], ["layers.0/MatMul_1", "layers.0/MatMul_2"]),
        ]
    )
    nodes = ("layers.0/MatMul_1", "layers.0/MatMul_2")
    assert read_layers(text) == [Layer("a+b_myl1_3", "gemm", ("int8",), ("int8",), nodes)]


@pytest.mark.parametrize(
    ("kind", "inputs", "constants", "found"),
    [
        ("gemm", ["Int8"], ["Int8"], {"int8"}),
        ("gemm", ["FP8"], ["FP8"], {"fp8"}),
        ("gemm", ["FP8", "FP8"], [], {"fp8"}),
        ("gemm", ["BFloat16"], ["Int8"], {"bf16"}),
        ("gemm", ["Float"], ["Float"], {"fp32"}),
        ("runtime_fusion", ["BFloat16"], ["Int4", "BFloat16"], {"bf16"}),
        ("runtime_fusion", ["Float", "Half"], ["Half"], {"fp16"}),
        ("kgen", ["Float"], ["Float"], None),
    ],
)
def test_types(kind, inputs, constants, found):
    layers = read_layers(line(kind, inputs, constants))
    assert computed_products(layers).get("layers.0/MatMul_1") == found


def test_one_profile_of_two_loses_int8():
    layers = read_layers(
        line("gemm", ["Int8"], ["Int8"]) + "\n" + line("gemm", ["BFloat16"], ["BFloat16"])
    )
    claimed = {"layers.0/MatMul_1": "int8", "layers.1/MatMul_9": "int8"}
    assert compare_products(claimed, computed_products(layers)) == [
        "layers.0/MatMul_1 should multiply in int8, and multiplies in bf16, int8"
    ]


def test_counts():
    computed = computed_products(read_layers(line("gemm", ["Int8"], ["Int8"])))
    claimed = {"layers.0/MatMul_1": "int8", "output/MatMul_9": "fp32"}
    assert compare_products(claimed, computed) == []
    assert count_products(claimed, computed) == {"int8": 1, "a generated kernel": 1}
