"""One walk over a graph with all calibration batches at once.

Recomputing each layer's inputs from the images would cost one forward pass per layer. A graph is in topological order:
keep the live values of all batches, advance node by node, and free values that no later node reads. The whole
calibration then costs one forward pass.

Two networks can be walked side by side: the *student*, whose layers are replaced during the walk, and the *reference*,
which stays float. Up to their first difference they share their values.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, Batches
from bgd_plugin.calibration.store import Shelf, memory_of
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import module_at, spoken

__all__ = ["Values", "Walk", "last_uses", "run_node"]

Values = dict[str, Any]

_IN_PLACE_OPERATORS = frozenset(
    (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.iand, operator.ior, operator.setitem)
)


class Walk:
    """Live values of the student, and of the reference if one is given, by node name and batch.

    Args:
        student: the graph to walk; its modules may be replaced between two nodes.
        batches: the calibration data.
        reference: the same graph with float modules that never change.

    Attributes:
        seconds: time spent computing the nodes' values.
    """

    def __init__(
        self, student: fx.GraphModule, batches: Sequence[Batch], reference: fx.GraphModule | None = None
    ) -> None:
        self.student = student
        self.reference = reference
        self.order: list[fx.Node] = list(student.graph.nodes)
        self.position = 0
        self.seconds = 0.0
        store = Batches.of(batches).store
        own = store.claim(self, [student] if reference is None else [student, reference])
        self.student_values: Sequence[Values] = Shelf(store, f"{own}student")
        self.reference_values: Sequence[Values] = Shelf(store, f"{own}reference")
        self._given: Sequence[Values] = Shelf(store, f"{own}given")  # the user's own tensors
        for index, batch in enumerate(batches):
            values = {node.name: value for node, value in batch.placeholders(student.graph).items()}
            content = store.open(index)
            content |= {f"{own}student": values, f"{own}reference": dict(values), f"{own}given": dict(values)}
        self._differs: set[str] = set()
        self._changed: set[str] = set()
        self._last_use = last_uses(self.order)

    @property
    def batch_count(self) -> int:
        """Number of batches."""
        return len(self.student_values)

    @property
    def place(self) -> str:
        """The current node, for error messages."""
        return str(self.order[self.position].target)

    def nodes(self, stops: Collection[str] | None = None) -> Iterator[fx.Node]:
        """Yield each node that computes something, before it runs; it runs when the next one is requested.

        Args:
            stops: names of the nodes that are wanted; None: all. What lies between two of them runs in one go for each
                batch, so that batches are fetched as seldom as possible.
        """
        waiting: list[fx.Node] = []
        for position, node in enumerate(self.order):
            if node.op not in ("call_module", "call_function", "call_method", "get_attr"):
                continue
            if stops is None or node.name in stops:
                self._advance(waiting)
                self.position, waiting = position, []
                yield node
            waiting.append(node)
        self._advance(waiting)

    def mark_changed(self, target: str) -> None:
        """Record that the student differs from the reference at `target`, or at the node of that name."""
        self._changed.add(target)

    def differs(self, node: fx.Node) -> bool:
        """Whether student and reference values differ at a node that has run."""
        return node.name in self._differs

    def differs_at(self, node: fx.Node) -> bool:
        """Whether their values will differ, also at a node that has not run yet."""
        if node in self.order[: self.position]:
            return self.differs(node)
        is_changed = node.op in ("call_module", "get_attr") and str(node.target) in self._changed
        return is_changed or any(map(self.differs_at, node.all_input_nodes))

    def pairs(self, node: fx.Node) -> Iterator[tuple[Any, Any]]:
        """Student and reference values of a live node, batch by batch."""
        for mine, theirs in zip(self.student_values, self.reference_values, strict=True):
            yield mine[node.name], theirs[node.name]

    def drift(self, node: fx.Node, batch: int) -> Tensor:
        """The student's error at a node that has run: the reference's value minus the student's, of the same shape.

        Args:
            node: its value is one tensor.
            batch: index of the batch.
        """
        difference: Tensor = self.reference_value(node, batch) - self.student_value(node, batch)
        return difference

    def student_value(self, node: fx.Node, batch: int) -> Any:
        """The student's value at `node` in a batch (by index): live, or computed ahead with the current modules."""
        return self._value(self.student, node, self.student_values[batch], batch)

    def reference_value(self, node: fx.Node, batch: int) -> Any:
        """The reference's value at `node` in a batch (by index): live, or computed ahead."""
        assert self.reference is not None
        return self._value(self.reference, node, self.reference_values[batch], batch)

    def _value(self, network: fx.GraphModule, node: fx.Node, values: Values, batch: int) -> Any:
        if node.name in values:
            return values[node.name]
        ahead = dict(values)
        for later in self.order[self.position :]:
            run_node(network, later, ahead, protected=(values, self._given[batch]))
            if later is node:
                return ahead[node.name]
        raise AssertionError(f"{node.name} is not live and does not come later")

    def run_ahead(self, node: fx.Node, batch: int, context: AbstractContextManager[Any], *, of_reference: bool) -> None:
        """Run the graph up to a node on copies of the live values, and the node itself inside a context.

        Args:
            node: where to stop.
            batch: index of the batch.
            context: entered for the node alone.
            of_reference: run the reference instead of the student.
        """
        network = self.reference if of_reference else self.student
        values = (self.reference_values if of_reference else self.student_values)[batch]
        assert network is not None
        ahead = dict(values)
        for later in self.order[self.position :]:
            with context if later is node else nullcontext():
                run_node(network, later, ahead, protected=(values, self._given[batch]))
            if later is node:
                return

    def finish(self, batch: int) -> Any:
        """The student's output for the batch at this index, computed from the live values. Gradients are kept."""
        values = dict(self.student_values[batch])
        for node in self.order[self.position :]:
            if node.op == "output":
                return pytree.tree_map_only(fx.Node, lambda n: values[n.name], node.args[0])
            run_node(self.student, node, values, protected=(self.student_values[batch], self._given[batch]))
            for dead in self._last_use.get(node.name, ()):
                values.pop(dead, None)
        raise AssertionError("the graph has no output")

    @torch.no_grad()
    def _advance(self, nodes: Sequence[fx.Node]) -> None:
        """Run some nodes for one batch after another."""
        start = time.perf_counter()
        known, found = set(self._differs), set(self._differs)
        for mine, theirs, given in zip(self.student_values, self.reference_values, self._given, strict=True):
            self._differs = set(known)  # what differs after the last node may not yet differ at the first one
            for node in nodes:
                self._run(node, mine, theirs, given)
            found |= self._differs
        self._differs = found
        self.seconds += time.perf_counter() - start

    def _run(self, node: fx.Node, mine: Values, theirs: Values, given: Values) -> None:
        """Run a node for one batch, in the float network only where its value may be another one."""
        at_target = node.op in ("call_module", "get_attr") and str(node.target) in self._changed
        differs = at_target or node.name in self._changed or any(n.name in self._differs for n in node.all_input_nodes)
        run_node(self.student, node, mine, protected=(given, theirs) if differs else (given,))
        if differs:
            self._differs.add(node.name)
        if self.reference is not None and differs:
            run_node(self.reference, node, theirs, protected=(given, mine))
            # a value written in place is now two values as well
            self._differs.update(name for name in mine if mine[name] is not theirs.get(name))
        elif self.reference is not None:
            theirs.update({name: value for name, value in mine.items() if name not in self._differs})
        for dead in self._last_use.get(node.name, ()):
            mine.pop(dead, None)
            theirs.pop(dead, None)


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
