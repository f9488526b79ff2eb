"""A small layer over onnx-ir's tape: every value gets a dtype, every node a scope in its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

T = TypeVar("T")
# The domain of functions: see `GraphBuilder.call`.
DOMAIN = "embedport"


class GraphBuilder:
    """Records nodes and initializers, and builds the model from them.

    Args:
        opsets: Operator versions by domain.
        ir_version: The ONNX file's IR version.

    Attributes:
        scope: The part of the model being described; nodes are named "{scope}/{operator}_{n}".
            embedport.artifact.segments cuts a graph into parts by these names.
    """

    def __init__(self, opsets: dict[str, int], ir_version: int) -> None:
        self.scope = ""
        self._opsets, self._ir_version = opsets, ir_version
        self._tape = ir.tape.Tape()
        self._outermost = self._tape
        self._constants: dict[tuple[Any, ...], ir.Value] = {}
        self._functions: dict[str, ir.Function] = {}
        self._count = 0

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Add a node with one output; its dtype is the first input's unless given."""
        return self.op_outputs(op_type, *inputs, dtypes=[dtype], domain=domain, **attributes)[0]

    def op_outputs(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtypes: Sequence[ir.DataType | None],
        domain: str = "",
        **attributes: Any,
    ) -> list[ir.Value]:
        """Add a node with one output per entry of `dtypes`; None is the first input's dtype."""
        name = f"{self.scope}/{op_type}_{self._count}"
        self._count += 1
        first = inputs[0].dtype if inputs and inputs[0] is not None else None
        outputs = [
            ir.Value(name=f"{name}:{i}", type=ir.TensorType(dtype or first or ir.DataType.FLOAT))
            for i, dtype in enumerate(dtypes)
        ]
        self._tape.op_multi_out(
            op_type, inputs, attributes, domain=domain, name=name, outputs=outputs
        )
        return outputs

    def call(
        self,
        name: str,
        *inputs: ir.Value,
        dtypes: Sequence[ir.DataType],
        describe: Callable[..., Sequence[ir.Value]],
        **attributes: int | float,
    ) -> list[ir.Value]:
        """Add a node that calls a model-local function, which the first call defines.

        A runtime runs the function's own nodes, or a kernel registered under its name.

        Args:
            name: The function's name.
            inputs: Everything that the function's nodes read; they cannot see the graph's values.
            dtypes: The outputs' dtypes. An output that nothing reads is dropped, except the last.
            describe: Takes a builder and the function's inputs, adds the nodes, and returns the
                outputs.
            attributes: Constants for the kernel. They are the same at every call, so `describe`
                may use them too.
        """
        if name not in self._functions:
            g = _FunctionBuilder(self._opsets, self._ir_version)
            g.scope = name
            parameters = [ir.Value(name=f"{name}/{i}", type=x.type) for i, x in enumerate(inputs)]
            results = describe(g, *parameters)
            self._functions[name] = g.function(parameters, results, attributes)
        return self.op_outputs(name, *inputs, dtypes=dtypes, domain=DOMAIN, **attributes)

    def choose(
        self,
        condition: ir.Value,
        then: Callable[[], Sequence[ir.Value]],
        otherwise: Callable[[], Sequence[ir.Value]],
    ) -> list[ir.Value]:
        """Add an If node: one of two branches, chosen when the graph runs.

        Args:
            condition: bool scalar.
            then: Adds the branch's nodes, which may read the outer graph's values, and returns the
                outputs.
            otherwise: The other branch, with as many outputs of the same dtypes.
        """
        first, second = self._branch(then), self._branch(otherwise)
        dtypes = [value.dtype for value in first.outputs]
        return self.op_outputs(
            "If", condition, dtypes=dtypes, then_branch=first, else_branch=second
        )

    def _branch(self, describe: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        outer_tape, self._tape = self._tape, ir.tape.Tape()
        outputs = describe()
        nodes, self._tape = self._tape.nodes, outer_tape
        return ir.Graph([], outputs, nodes=nodes, name=f"{self.scope}/branch_{self._count}")

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Cast a value, unless it has the dtype already."""
        if value.dtype == dtype:
            return value
        return self.op("Cast", value, dtype=dtype, to=dtype)

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """A small constant, added once for each value and dtype."""
        array = np.asarray(value, dtype.numpy())
        key = (dtype, array.shape, array.tobytes())
        if key not in self._constants:
            name = f"constant_{len(self._constants)}"
            self._constants[key] = self.initializer(ir.tensor(array, dtype=dtype, name=name))
        return self._constants[key]

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a weight, under the tensor's name."""
        return self._outermost.initializer(tensor)

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], name: str) -> ir.Model:
        """Build the model from everything recorded."""
        for node in self._tape.nodes:
            # The last output keeps its name: onnxruntime counts a node's outputs by it.
            for value in node.outputs[:-1] if node.domain == DOMAIN else ():
                if not value.uses() and value not in outputs:
                    value.name = ""
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports=self._opsets | ({DOMAIN: 1} if self._functions else {}),
            name=name,
        )
        return ir.Model(
            graph,
            ir_version=self._ir_version,
            producer_name="embedport",
            functions=list(self._functions.values()),
        )


class _FunctionBuilder(GraphBuilder):
    """Records a function's nodes; a function has no initializers, so constants are nodes."""

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        name = f"{self.scope}/{tensor.name}"
        value = ir.Value(name=f"{name}:0", type=ir.TensorType(tensor.dtype))
        self._outermost.op_multi_out("Constant", [], {"value": tensor}, name=name, outputs=[value])
        return value

    def function(
        self,
        inputs: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        attributes: dict[str, int | float],
    ) -> ir.Function:
        """Build the function from everything recorded, named after the scope."""
        integer, real = ir.AttributeType.INT, ir.AttributeType.FLOAT
        return ir.Function(
            DOMAIN,
            self.scope,
            graph=ir.Graph(inputs, outputs, nodes=self._tape.nodes, opset_imports=self._opsets),
            attributes=[
                ir.Attr(name, integer if isinstance(value, int) else real, None)
                for name, value in attributes.items()
            ],
        )
