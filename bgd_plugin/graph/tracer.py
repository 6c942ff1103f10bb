"""Tracing: a network becomes a graph in which every layer that we replace is one node."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from bgd_plugin.errors import TraceError
from bgd_plugin.graph.computed import module_or_none
from bgd_plugin.graph.kinds import MODULES
from bgd_plugin.graph.norms import has_running_statistics
from bgd_plugin.nn import FloatWeight, FrozenNorm, PQModule

__all__ = ["PQTracer", "copy_module", "is_quantized_elsewhere", "set_modes", "trace"]


_SWAPPABLE = tuple(MODULES)


class PQTracer(fx.Tracer):
    """A tracer that stops at our own modules, at norms with running statistics, and at the layers that we replace.

    Without the first rule a second pass would walk into the decoding of a weight. A subclass of Conv or Linear with a
    forward of its own is walked into, and found by its functional call.
    """

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = isinstance(m, (PQModule, FloatWeight, FrozenNorm))
        if ours or has_running_statistics(m) or is_quantized_elsewhere(m):
            return True
        for base in _SWAPPABLE:
            if isinstance(m, base):
                return type(m).forward is base.forward
        return super().is_leaf_module(m, module_qualified_name)


def is_quantized_elsewhere(module: nn.Module) -> bool:
    """Whether a module holds integers of another quantizer in place of a weight.

    Walking into it would decode the weight while tracing, and leave it in the graph as a float constant.
    """
    is_layer = hasattr(module, "in_features") or hasattr(module, "in_channels")
    if isinstance(module, PQModule) or not is_layer or any(p.ndim > 1 for p in module.parameters()):
        return False
    return any(b.ndim > 1 and not b.is_floating_point() and b.dtype != torch.bool for b in module.buffers())


def trace(model: nn.Module) -> fx.GraphModule:
    """The graph of `model`, over the same modules and parameters.

    A `GraphModule` is passed on as it is. The graph follows the branches of evaluation mode; `model` gets its mode
    back.

    Raises:
        TraceError: naming the smallest submodule that cannot be traced, and what to do about it.
    """
    if isinstance(model, fx.GraphModule):
        return model
    modes = {path: module.training for path, module in model.named_modules()}
    with _attributes_kept(model):
        model.eval()
        result = _traced(model)
    set_modes(result, modes)
    return result


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its attributes back at the end: a forward that keeps what it computes, as torchvision's
    `MultiScaleRoIAlign` does, would otherwise keep the stand-ins that the tracer sent through it.
    """
    before = [(vars(module), dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for attributes, kept in before:
            attributes.clear()
            attributes.update(kept)


def set_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """Set the training mode of each module by its path; paths that are not in `modes` follow the root."""
    for path, module in model.named_modules():
        module.training = modes.get(path, modes[""])


def _traced(model: nn.Module) -> fx.GraphModule:
    tracer = PQTracer()
    try:
        graph = tracer.trace(model)
    except Exception as error:  # a tracer runs the user's forward: anything may come out of it
        culprit, cause = _smallest_untraceable(model, "", error)
        where = f"submodule {culprit!r} ({_type_at(model, culprit)})" if culprit else f"{type(model).__name__} itself"
        raise TraceError(
            f"the network does not trace: {where} raises {type(cause).__name__}: {cause}. "
            "Its forward depends on the values of its inputs, or runs code that torch.fx does not follow. Quantize the "
            "parts that do trace (bgd_plugin.quantize on a submodule), or pass a GraphModule from a tracer of your own "
            "in which that part is a leaf"
        ) from error
    result = fx.GraphModule(model, graph, type(model).__name__)
    _keep_owners_(result, model)
    return result


def _keep_owners_(result: fx.GraphModule, model: nn.Module) -> None:
    """Put layers in place of which the graph reads parameters only: a `GraphModule` has plain holders there."""
    for node in result.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        if node.op == "get_attr" and owner and isinstance(module_or_none(model, owner), _SWAPPABLE):
            result.add_submodule(owner, model.get_submodule(owner))


def _type_at(model: nn.Module, name: str) -> str:
    return type(model.get_submodule(name)).__name__


def _smallest_untraceable(model: nn.Module, prefix: str, error: Exception) -> tuple[str, Exception]:
    """Name and error of the deepest submodule that does not trace by itself."""
    tracer = PQTracer()
    for name, child in model.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found = _smallest_untraceable(child, path, error)
            if found[0] != path:
                return found
            continue
        if tracer.is_leaf_module(child, path):
            continue
        try:
            PQTracer().trace(child)
        except Exception as inner:  # as above: the user's own forward
            return _smallest_untraceable(child, path, inner)
    return prefix, error


def copy_module(model: nn.Module, *, share_tensors: bool = False) -> Any:
    """A copy whose modules can be changed without touching `model`.

    Args:
        share_tensors: keep the very parameters and buffers, so that the copy costs no memory; never write into them.
    """
    # weights that a hook computes at each call (pruning masks, norms) refuse to be copied with their history
    attributes = (value for module in model.modules() for value in vars(module).values())
    memo: dict[int, Any] = {id(t): t.detach() for t in attributes if isinstance(t, Tensor) and t.grad_fn is not None}
    if share_tensors:
        memo |= {id(t): t for t in (*model.parameters(), *model.buffers())}
    duplicate: Callable[..., Any] = copy.deepcopy
    return duplicate(model, memo)
