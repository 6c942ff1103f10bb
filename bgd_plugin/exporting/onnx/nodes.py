"""Nodes and constants added at the beginning of an ONNX graph, with short names."""

from __future__ import annotations

from typing import Any

import numpy
from numpy.typing import NDArray

__all__ = ["Nodes"]

_PREFIX = "bgd."


class Nodes:
    """Collects nodes and constants, and inserts them before all others of a graph.

    Equal constants are shared. Names take a noticeable part of a file of many small layers, so they are short.

    Args:
        graph: `onnx_ir.Graph`.
    """

    def __init__(self, graph: Any) -> None:
        self._graph = graph
        self._nodes: list[Any] = []
        self._constants: dict[tuple[Any, ...], Any] = {}

    def constant(self, values: Any, dtype: Any) -> Any:
        """A value that holds a small array of `values`; `dtype` is numpy's."""
        array = numpy.asarray(values, dtype=dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.tensor(f"{_PREFIX}c{len(self._constants)}", array)
        return self._constants[key]

    def tensor(self, name: str, array: NDArray[Any]) -> Any:
        """An initializer with the content of `array`; it replaces one of the same name."""
        import onnx_ir

        value = onnx_ir.Value(
            name=name,
            shape=onnx_ir.Shape(array.shape),
            type=onnx_ir.TensorType(onnx_ir.DataType.from_numpy(array.dtype)),
            const_value=onnx_ir.Tensor(array, name=name),
        )
        self._graph.initializers.pop(name, None)
        self._graph.register_initializer(value)
        return value

    def add(self, op_type: str, *inputs: Any, **attributes: Any) -> Any:
        """Add a node and return its only output.

        Args:
            op_type: ONNX operator.
            inputs: values.
            attributes: of the operator.
        """
        import onnx_ir

        name = f"{_PREFIX}{len(self._nodes)}"
        node = onnx_ir.node(op_type, inputs, attributes or None, num_outputs=1, name=name)
        node.outputs[0].name = name
        self._nodes.append(node)
        return node.outputs[0]

    def cast(self, value: Any, dtype: Any) -> Any:
        """The value in another type; `dtype` is numpy's."""
        import onnx_ir

        return self.add("Cast", value, to=int(onnx_ir.DataType.from_numpy(numpy.dtype(dtype))))

    def reshape(self, value: Any, shape: tuple[int, ...]) -> Any:
        """The value in another shape."""
        return self.add("Reshape", value, self.constant(shape, numpy.int64))

    def insert_(self) -> None:
        """Insert the nodes before all others of the graph."""
        if not self._nodes:
            return
        if len(self._graph):
            self._graph.insert_before(self._graph[0], self._nodes)
        else:
            self._graph.extend(self._nodes)
        self._nodes = []
