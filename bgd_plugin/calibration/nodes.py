"""One node of a graph: its value from those of other nodes, and when values are needed no more."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.store import memory_of
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import module_at, spoken

__all__ = ["COMPUTING", "Values", "last_uses", "run_node"]

Values = dict[str, Any]

COMPUTING = frozenset(("call_module", "call_function", "call_method", "get_attr"))
"""The kinds of nodes that have a value of their own."""

_IN_PLACE_OPERATORS = frozenset(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior, operator.setitem)
)


def run_node(
    graph_module: fx.GraphModule, node: fx.Node, values: Values, *, protected: tuple[Values, ...] = ()
) -> None:
    """Compute a node's value into `values`, without writing to memory of values that are also in `protected`.

    Raises:
        CalibrationError: the network raises at this node.
    """
    if node.op in ("placeholder", "output"):
        return
    module = module_at(graph_module, str(node.target)) if node.op == "call_module" else None
    if _writes_in_place(node, module):
        _own_memory_(values, [n.name for n in node.all_input_nodes], protected)
    args, kwargs = _filled(node.args, values), _filled(node.kwargs, values)
    try:
        values[node.name] = _call(graph_module, node, module, args, kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(f"the network fails on a calibration batch, at {spoken(node)}: {error}") from error


def _call(graph_module: fx.GraphModule, node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if module is not None:
        return module(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "get_attr":
        value: Any = graph_module
        for atom in str(node.target).split("."):
            value = getattr(value, atom)
        return value
    assert callable(node.target)
    return node.target(*args, **kwargs)


def _filled(arguments: Any, values: Values) -> Any:
    """A node's arguments with other nodes' values, in plain lists and dicts, which functions may write to."""
    if isinstance(arguments, fx.Node):
        return values[arguments.name]
    if isinstance(arguments, list):
        return [_filled(argument, values) for argument in arguments]
    if isinstance(arguments, dict):
        return {key: _filled(argument, values) for key, argument in arguments.items()}
    if isinstance(arguments, slice):
        return slice(*(_filled(part, values) for part in (arguments.start, arguments.stop, arguments.step)))
    if type(arguments) is tuple:
        return tuple([_filled(argument, values) for argument in arguments])
    if isinstance(arguments, tuple) and hasattr(arguments, "_fields"):
        return type(arguments)(*(_filled(argument, values) for argument in arguments))
    return arguments


def _own_memory_(values: Values, inputs: list[str], protected: tuple[Values, ...]) -> None:
    """Copy the storage of `inputs` that they share with protected values, keeping views of it intact."""
    taken = {memory_of(t).data_ptr() for t in pytree.tree_leaves(protected) if isinstance(t, Tensor)}
    read = [t for t in pytree.tree_leaves([values[name] for name in inputs]) if isinstance(t, Tensor)]
    shared = {memory_of(t).data_ptr(): memory_of(t) for t in read if memory_of(t).data_ptr() in taken}
    moved = {pointer: memory.clone() for pointer, memory in shared.items()}  # type: ignore[no-untyped-call]

    def own(t: Tensor) -> Tensor:
        memory = moved.get(memory_of(t).data_ptr())
        return t if memory is None else t.new_empty(0).set_(memory, t.storage_offset(), t.size(), t.stride())

    if moved:
        values.update({name: pytree.tree_map_only(Tensor, own, value) for name, value in values.items()})


def _writes_in_place(node: fx.Node, module: nn.Module | None) -> bool:
    if module is not None:
        return any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_method":
        name = str(node.target)
        return (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    schema = getattr(node.target, "_schema", None)
    if schema is not None:  # a torch operator, as in exported graphs
        return bool(schema.is_mutable)
    name = getattr(node.target, "__name__", "")
    in_place_argument = bool(node.kwargs.get("inplace")) or any(a is True for a in node.args)
    return node.target in _IN_PLACE_OPERATORS or in_place_argument or (name.endswith("_") and not name.endswith("__"))


def last_uses(order: list[fx.Node]) -> dict[str, list[str]]:
    """For each node, by name, the names of the values that no later node of a graph, in `order`, needs."""
    last: dict[str, str] = {}
    for node in order:
        last[node.name] = node.name
        for used in node.all_input_nodes:
            last[used.name] = node.name
    outputs = {n.name for node in order if node.op == "output" for n in node.all_input_nodes}
    dead: dict[str, list[str]] = {}
    for name, user in last.items():
        if name not in outputs:
            dead.setdefault(user, []).append(name)
    return dead
