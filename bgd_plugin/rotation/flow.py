"""One run of a network that shows its residual streams: what is added into them, and what reads them.

As in `calibration.watch`, this looks at the operators of torch and not at classes. Three kinds of value are followed:
a sum of layers' outputs (a residual stream, or one layer's output by itself), a norm's output of such a sum, and what
attention makes of a layer's output, its values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bgd_plugin.calibration import Batch, intercepted, run_module
from bgd_plugin.rotation.structure import Heads, Part, Structure

__all__ = ["structure_of"]

_aten: Any = torch.ops.aten
_ADDS = ("aten::add", "aten::add_", "aten::cat", "aten::index_add", "aten::index_add_")
_MOVES = ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "expand", "unsqueeze", "squeeze", "unbind")
_TAKES = ("select", "slice", "split", "split_with_sizes", "index", "index_select")
_KEEPS = (*_MOVES, *_TAKES, "clone", "contiguous", "alias", "detach", "_to_copy", "lift_fresh")
_SCALES = ("aten::mul", "aten::mul_", "aten::div", "aten::div_")
_PRODUCTS = {_aten.mm.default: (0, 1), _aten.bmm.default: (0, 1), _aten.addmm.default: (1, 2)}
_ATTENTIONS = "aten::_scaled_dot_product"


@dataclass(frozen=True, kw_only=True)
class _Sum:
    parts: frozenset[Part]


@dataclass(frozen=True, kw_only=True)
class _Normed:
    path: str


_Tag = _Sum | _Normed | Heads


@torch.no_grad()
def structure_of(network: nn.Module, batch: Batch, norms: list[str]) -> Structure:
    """What one run over a batch shows.

    Args:
        network: in evaluation mode.
        batch: the arguments.
        norms: paths of the modules that normalize over the last dimension.
    """
    flow = _Flow(network)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_fast_attention())
        stack.enter_context(intercepted(network, norms, flow.on_norm))
        stack.enter_context(flow)
        answer = batch.call(network)
    flow.returned(answer)
    return flow.structure


@contextlib.contextmanager
def _without_fast_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Flow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows values by the memory that they lie in."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.structure = Structure()
        self._parameters = {_memory(p): (name, p) for name, p in network.named_parameters() if not p.is_meta}
        self._tags: dict[int, _Tag] = {}
        self._known: dict[int, StorageWeakRef] = {}  # keep the number of a storage, not its memory, from being reused
        self._in_norm = 0

    def on_norm(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A norm runs: what it computes inside is not looked at."""
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tag = self._tags.get(_memory(given[0])) if given else None
        self._in_norm += 1
        try:
            output = run_module(module, args, kwargs)
        finally:
            self._in_norm -= 1
        is_read = isinstance(tag, _Sum) and isinstance(output, Tensor)
        self.structure.norm_read(path, tag.parts if isinstance(tag, _Sum) and is_read else None)
        if is_read:
            self._mark(output, _Normed(path=path))
        return output

    def returned(self, answer: Any) -> None:
        """What the network returns is read by whoever called it."""
        for tensor in _answers(answer):
            self._read_by(self._tags.get(_memory(tensor)), "the network's answer")

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator: computed, then followed."""
        result = operator(*args, **(kwargs or {}))
        outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        tag = None if self._in_norm else self._tag_of(operator, args, inputs, result)
        shared = {_memory(x) for x in inputs}
        for output in outputs:
            if tag is not None:
                self._mark(output, tag)
            elif _memory(output) not in shared:
                self._tags.pop(_memory(output), None)
        return result

    def _tag_of(self, operator: Any, args: Any, inputs: list[Tensor], result: Any) -> _Tag | None:
        name = operator._schema.name
        if operator in _PRODUCTS:
            x, weight = (args[place] for place in _PRODUCTS[operator])
            return self._product(x, weight, args[0] if operator is _aten.addmm.default else None, name)
        if operator is _aten.embedding.default and _memory(args[0]) in self._parameters:
            return _Sum(parts=frozenset((Part(name=self._parameters[_memory(args[0])][0], role="table"),)))
        if operator is _aten.convolution.default and _memory(args[1]) in self._parameters:
            return self._convolution(args)
        tags = [self._tags.get(_memory(x)) for x in inputs]
        if name in _ADDS:
            return self._added(inputs, tags, name)
        if name.startswith(_ATTENTIONS):
            return self._attended(args[2], inputs)
        known = [tag for tag in tags if tag is not None]
        if not known:
            return None
        if self._keeps(name, inputs, tags, args):
            return known[0]
        for tag in known:
            self._read_by(tag, name.removeprefix("aten::"))
        return None

    def _keeps(self, name: str, inputs: list[Tensor], tags: list[_Tag | None], args: Any) -> bool:
        """Whether an operator moves rows, or multiplies each by a number: a rotation passes through it."""
        short = name.removeprefix("aten::")
        if name in _SCALES:
            others = [x for x, tag in zip(inputs, tags, strict=True) if tag is None]
            return len(others) == len(inputs) - 1 and all(x.ndim == 0 or x.shape[-1] == 1 for x in others)
        if short == "mean":
            dims = args[1] if len(args) > 1 and args[1] else [-1]
            return all(dim % inputs[0].ndim != inputs[0].ndim - 1 for dim in dims)
        return short in _KEEPS

    def _product(self, x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> _Tag | None:
        tag = self._tags.get(_memory(x))
        part = self._part(weight, bias)
        if part is None:
            other = self._tags.get(_memory(weight))
            if tag is None and name == "aten::bmm" and isinstance(other, (_Sum, Heads)):
                return self._attended(weight, [x, weight])
            self._read_by(tag, "a product")
            self._read_by(other, "a product")
            return None
        if isinstance(tag, _Normed):
            self.structure.norms[tag.path].readers.append(part)
        elif isinstance(tag, _Sum):
            self.structure.direct.append((tag.parts, part))
        elif isinstance(tag, Heads):
            self.structure.heads.append((tag, part))
        return _Sum(parts=frozenset((part,)))

    def _part(self, weight: Tensor, bias: Tensor | None) -> Part | None:
        """The rows of a parameter that a product `x @ weight` reads, with the bias that is added to it."""
        name, parameter = self._parameters.get(_memory(weight), ("", None))
        if parameter is None or parameter.ndim != 2 or weight.ndim != 2:
            return None
        bias_name = "" if bias is None else self._parameters.get(_memory(bias), ("?", None))[0]
        offset = int(weight.storage_offset() - parameter.storage_offset())
        columns = parameter.shape[1]
        if weight.stride() == (1, columns) and weight.shape[0] == columns and offset % columns == 0:
            start, rows = offset // columns, weight.shape[1]
            return Part(name=name, role="rows", start=start, stop=start + rows, bias=bias_name)
        if weight.shape == parameter.shape and weight.stride() == parameter.stride():
            return Part(name=name, role="columns", start=0, stop=columns, bias=bias_name)
        return None

    def _convolution(self, args: Any) -> _Tag | None:
        name, parameter = self._parameters[_memory(args[1])]
        self._read_by(self._tags.get(_memory(args[0])), "a convolution")
        if args[6] or args[8] != 1:
            return None
        bias = "" if args[2] is None else self._parameters.get(_memory(args[2]), ("?", None))[0]
        return _Sum(parts=frozenset((Part(name=name, role="rows", start=0, stop=len(parameter), bias=bias),)))

    def _added(self, inputs: list[Tensor], tags: list[_Tag | None], name: str) -> _Tag | None:
        if not any(isinstance(tag, _Sum) for tag in tags):
            for tag in tags:
                self._read_by(tag, name.removeprefix("aten::"))
            return None
        parts: frozenset[Part] = frozenset()
        unknown = False
        for x, tag in zip(inputs, tags, strict=True):
            if isinstance(tag, _Sum):
                parts |= tag.parts
            elif tag is None and _memory(x) in self._parameters:
                parts |= {Part(name=self._parameters[_memory(x)][0], role="plain")}
            elif tag is not None or (x.is_floating_point() and x.numel()):  # indices and empty caches may go along
                self._read_by(tag, name.removeprefix("aten::"))
                unknown = True
        self.structure.joined(parts)
        if unknown:
            self.structure.spoil(parts, "something else is added to it")
            return None
        return _Sum(parts=parts)

    def _attended(self, values: Tensor, inputs: list[Tensor]) -> _Tag | None:
        tag = self._tags.get(_memory(values))
        for x in inputs:
            if x is not values:
                self._read_by(self._tags.get(_memory(x)), "attention")
        if isinstance(tag, Heads):
            return tag
        parts = list(tag.parts) if isinstance(tag, _Sum) else []
        self._read_by(tag, "attention")
        if len(parts) != 1 or parts[0].role == "table" or values.ndim < 3:
            return None
        part, width = parts[0], values.shape[-1]
        rows = part.stop - part.start
        is_view = values.ndim == 4 and values.stride(-1) == 1 and values.stride(-2) == rows
        if is_view and values.stride(1):  # on the layer's output, and no head stands for several
            first = int(values.storage_offset()) % rows
            return Heads(part=part, width=width, first=first, step=values.stride(1), count=values.shape[1])
        return Heads(part=part, width=width, first=0, step=width, count=rows // width) if not rows % width else None

    def _read_by(self, tag: _Tag | None, reader: str) -> None:
        if isinstance(tag, _Sum):
            self.structure.spoil(tag.parts, f"{reader} reads it")
        elif isinstance(tag, _Normed):
            self.structure.norms[tag.path].others.add(reader)

    def _mark(self, tensor: Tensor, tag: _Tag) -> None:
        memory = _memory(tensor)
        if memory not in self._parameters:
            self._tags[memory] = tag
            if memory not in self._known:
                self._known[memory] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def _answers(answer: Any) -> Iterator[Tensor]:
    """The tensors of an answer; caches and other objects of the network's own are passed over."""
    if isinstance(answer, Tensor):
        yield answer
    elif isinstance(answer, dict):
        for value in answer.values():
            yield from _answers(value)
    elif isinstance(answer, (list, tuple)):
        for value in answer:
            yield from _answers(value)


def _memory(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:  # a sparse tensor, for one
        return id(tensor)
