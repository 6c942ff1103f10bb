"""Tracing: a network becomes a graph in which every layer that can be replaced is one node."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.errors import TraceError
from bgd_plugin.graph.bare import bare_layers
from bgd_plugin.graph.computed import computed_parameters, module_or_none
from bgd_plugin.graph.copying import drop_hooks_, set_modes
from bgd_plugin.graph.in_place import untouched
from bgd_plugin.graph.kinds import MODULES, runs_its_parents_forward
from bgd_plugin.graph.layer import FoundLayer
from bgd_plugin.nn import FloatWeight, FrozenNorm, NarrowModule, PQModule, RotatedNorm, has_running_statistics

__all__ = ["FROM_DATA", "PQTracer", "is_quantized_elsewhere", "trace"]

FROM_DATA: Any = object()
"""Stands for the value of an argument that differs from batch to batch, as tensors do."""

_SWAPPABLE = tuple(MODULES)


class PQTracer(fx.Tracer):
    """A tracer whose leaves are our own modules, norms with running statistics, and the layers that can be replaced.

    If our modules were no leaves, a second pass would trace the decoding of a weight. A subclass of Conv or Linear that
    overrides forward is traced into, and found by its functional call.

    Args:
        given: the arguments of the network's calls: a value for each, or `FROM_DATA`. Values, and the defaults of the
            other arguments, become constants of the graph. None: each argument is an input of the graph.
    """

    def __init__(self, given: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._given = given

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As in `torch.fx.Tracer`: whether module `m` becomes one node; `module_qualified_name` is its path."""
        ours = isinstance(m, (PQModule, NarrowModule, FloatWeight, FrozenNorm, RotatedNorm))
        is_opaque = isinstance(m, torch.jit.ScriptModule) or is_quantized_elsewhere(m)
        if ours or is_opaque or has_running_statistics(m):
            return True
        if isinstance(m, _SWAPPABLE):
            return runs_its_parents_forward(m)
        return super().is_leaf_module(m, module_qualified_name) or _reads_layers_by_name(m)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        """As in `torch.fx.Tracer`; arguments that are constants do not become inputs of the graph.

        Args:
            root_fn, is_module, concrete_args: as there.
        """
        parameters = list(inspect.signature(inspect.unwrap(root_fn)).parameters.values())[1:]
        if self._given is None or not is_module:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        constants: dict[str, Any] = {}
        proxies: list[Any] = []
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            value = self._given.get(parameter.name, parameter.default)
            if parameter.name in self._given or value is parameter.empty:
                proxies.append(self.create_proxy("placeholder", parameter.name, (), {}))
            if value is not FROM_DATA and value is not parameter.empty:
                constants[parameter.name] = value

        def called(root: nn.Module, *inputs: Any) -> Any:
            named = {proxy.node.target: value for proxy, value in zip(proxies, inputs, strict=True)} | constants
            by_place = [named.pop(p.name) for p in parameters if p.kind is p.POSITIONAL_ONLY]
            return root_fn(root, *by_place, **named)

        return called, [self.root, *proxies]


def _reads_layers_by_name(module: nn.Module) -> bool:
    """Whether a module without submodules holds layers' weights itself, as a mixture of experts does."""
    is_alone = not any(True for _ in module.children())
    return is_alone and any(isinstance(layer, FoundLayer) for layer in bare_layers(module, "", (), set()))


def is_quantized_elsewhere(module: nn.Module) -> bool:
    """Whether a module holds another quantizer's integers instead of a weight.

    Tracing into it would decode the weight and store it in the graph as a float constant.
    """
    is_layer = hasattr(module, "in_features") or hasattr(module, "in_channels")
    if isinstance(module, PQModule) or not is_layer or any(p.ndim > 1 for p in module.parameters()):
        return False
    return any(b.ndim > 1 and not b.is_floating_point() and b.dtype != torch.bool for b in module.buffers())


def trace(model: nn.Module, given: Mapping[str, Any] | None = None) -> fx.GraphModule:
    """The graph of `model`, over the same modules and parameters.

    A `GraphModule` is returned as it is. The graph follows the branches of evaluation mode. The network is traced
    without hooks, by `untouched`, so that neither it nor anything that hooks write to keeps the tracer's proxies. The
    effects of hooks are not in the graph, except those of modules that are one node.

    Args:
        model: the network; not changed.
        given: as for `PQTracer`. None: every argument without a default comes from data; if that does not trace, every
            argument is an input.

    Raises:
        TraceError: naming the smallest submodule that cannot be traced, and what to do.
    """
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph, held = _traced(model, PQTracer(given or {}))
    except Exception as error:  # tracing runs the user's forward, which may raise anything
        if given is not None:
            raise _error(model, error) from error
        try:
            graph, held = _traced(model, PQTracer())
        except Exception:  # as above
            raise _error(model, error) from error
    return _over(model, graph, held)


def _traced(model: nn.Module, tracer: PQTracer) -> tuple[fx.Graph, dict[str, Any]]:
    """A graph, and what its nodes refer to, constants that tracing has made included."""
    with untouched(model) as (scratch,):
        drop_hooks_(scratch)
        scratch.eval()
        graph = tracer.trace(scratch)
        targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")}
        return graph, {target: _at(scratch, target, None) for target in targets}


def _over(model: nn.Module, graph: fx.Graph, held: Mapping[str, Any]) -> fx.GraphModule:
    """A graph over the modules of the network that it was made of.

    Args:
        held: what its nodes refer to, for what the network does not have.
    """
    root = {target: _at(model, target, value) for target, value in held.items()}
    result = fx.GraphModule(root, graph, type(model).__name__)
    result.training = model.training
    _keep_owners_(result, model)
    set_modes(result, {path: module.training for path, module in model.named_modules()})
    return result


def _at(root: nn.Module, target: str, otherwise: Any) -> Any:
    """The value at a dotted path; `otherwise` if there is none, as for constants created by tracing."""
    value: Any = root
    for atom in target.split("."):
        modules = getattr(value, "_modules", {})  # reading the name may give a computed weight
        value = modules[atom] if atom in modules else getattr(value, atom, None)
        if value is None:
            return otherwise
    return value


def _error(model: nn.Module, error: Exception) -> TraceError:
    culprit, cause = _smallest_untraceable(model, "", error)
    where = f"submodule {culprit!r} ({_type_at(model, culprit)})" if culprit else f"{type(model).__name__} itself"
    reason = f"the network does not trace: {where} raises {type(cause).__name__}: {cause}"
    return TraceError(
        f"{reason}. Its forward depends on the values of its inputs, or runs code that torch.fx does not follow. "
        "Quantize the parts that do trace (bgd_plugin.quantize on a submodule), or pass a GraphModule from your own "
        "tracer in which that part is a leaf",
        reason,
    )


def _keep_owners_(result: fx.GraphModule, model: nn.Module) -> None:
    """Insert the layers of which the graph only reads parameters; a `GraphModule` has plain holders instead.

    They are other modules than the network's, with the same parameters: a graph exchanges the weights that it reads.
    """
    for node in result.graph.nodes:
        owner = str(node.target).rpartition(".")[0]
        module = module_or_none(model, owner) if node.op == "get_attr" and owner else None
        if isinstance(module, _SWAPPABLE) and not computed_parameters(module):
            result.add_submodule(owner, _holder_of(module))


def _holder_of(module: nn.Module) -> nn.Module:
    """Another module of the same class with the same parameters, buffers and attributes."""
    result = module.__class__.__new__(module.__class__)
    vars(result).update(vars(module))
    for table in ("_parameters", "_buffers", "_modules"):
        vars(result)[table] = dict(vars(module)[table])
    return result


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
            _traced(child, PQTracer({}))
        except Exception as inner:  # as above: the user's own forward
            return _smallest_untraceable(child, path, inner)
    return prefix, error
