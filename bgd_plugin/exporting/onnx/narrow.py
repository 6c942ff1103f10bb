"""Store initializers as narrow as in our own file, and add the nodes that widen them again."""

from __future__ import annotations

from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bgd_plugin.exporting.onnx.nodes import Nodes
from bgd_plugin.exporting.onnx.unpack import unpacked_codes, unpacked_mask
from bgd_plugin.files.format import State, narrowest, scales, stored_state

__all__ = ["narrow_"]

_NODE_BYTES = 80
"""Bytes of a node and its names in the file; narrowing that saves less makes the file longer."""
_WIDE = (torch.float32, torch.float64, torch.int16, torch.int32, torch.int64)


def narrow_(graph: Any, model: nn.Module) -> None:
    """Replace the initializers of a graph, in place, by their narrow form in `files.format.stored`.

    Args:
        graph: `onnx_ir.Graph` of the network, whose initializers have the names of the network's state.
        model: the network.
    """
    narrower = _Narrower(graph, model)
    for name in list(graph.initializers):
        narrower.replace_(name)
    narrower.nodes.insert_()


class _Narrower:
    def __init__(self, graph: Any, model: nn.Module) -> None:
        self.nodes = Nodes(graph)
        self._graph = graph
        state = State.of(model)
        self._state = state.tensors
        self._layers = state.layers
        self._content = stored_state(state)
        self._scales = scales(self._content)
        self._widened: dict[str, Any] = {}

    def replace_(self, name: str) -> None:
        """Replace an initializer by its narrow form and the nodes that widen it."""
        value = self._graph.initializers[name]
        first = self._content.header.get("aliases", {}).get(name, name)
        if first not in self._widened:
            widened = self._widened_state(first) if first in self._content.tensors else self._widened_constant(value)
            if widened is None:
                return
            self._widened[first] = widened
        wide = self._widened[first]
        if wide is not value:
            value.replace_all_uses_with(wide)
            if self._graph.initializers.get(name) is value:
                del self._graph.initializers[name]

    def _widened_state(self, name: str) -> Any:
        """A tensor of the network's state, narrow and widened; None if it cannot be narrower."""
        path, _, attribute = name.rpartition(".")
        layer = self._layers.get(path)
        narrow, state = self._content.tensors[name], self._state[name]
        if layer is not None and attribute == "codes":
            shape, dtype = tuple(layer.codes.shape), _array(layer.codes.reshape(-1)[:1]).dtype
            return unpacked_codes(self.nodes, name, _array(narrow), layer.code_bits, shape, dtype)
        if layer is not None and attribute == "mask":
            form = self._content.header["masks"][path]
            return unpacked_mask(self.nodes, name, _array(narrow), form, tuple(state.shape))
        if name in self._scales:
            return self._from_eight_bits(name, narrow, self._scales[name])
        return self._from_narrow(name, narrow, state)

    def _widened_constant(self, value: Any) -> Any:
        """A tensor outside of the state: a non-persistent buffer, or a constant of the code."""
        array = value.const_value.numpy() if value.const_value is not None else None
        if array is None or not isinstance(array, numpy.ndarray) or array.dtype.kind not in "fi":
            return None
        wide = torch.from_numpy(array.copy())
        return self._from_narrow(value.name, narrowest(wide, is_codebook=False), wide)

    def _from_narrow(self, name: str, narrow: Tensor, wide: Tensor) -> Any:
        saved = wide.numel() * (wide.element_size() - narrow.element_size())
        if wide.dtype not in _WIDE or saved <= _NODE_BYTES:
            return None
        return self.nodes.cast(self.nodes.tensor(name, _array(narrow)), _array(wide.reshape(-1)[:1]).dtype)

    def _from_eight_bits(self, name: str, numbers: Tensor, factors: Tensor) -> Any:
        """By Cast and Mul, because a DequantizeLinear would be computed at each run."""
        value = self.nodes.cast(self.nodes.tensor(name, _array(numbers)), numpy.float32)
        if len(factors) == 1:
            return self.nodes.add("Mul", value, self.nodes.constant(float(factors), numpy.float32))
        rows = _array(factors).reshape(-1, *(1 for _ in numbers.shape[1:]))
        return self.nodes.add("Mul", value, self.nodes.tensor(f"{name}.scale", rows))


def _array(tensor: Tensor) -> NDArray[Any]:
    result: NDArray[Any] = tensor.detach().cpu().contiguous().numpy()
    return result
