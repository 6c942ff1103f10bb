"""One walk over a graph with all calibration batches at once.

Recomputing each layer's inputs from the images would cost one forward pass per layer. A graph is in topological order:
keep the live values of all batches, advance node by node, and free values that no later node reads. The whole
calibration then costs one forward pass.

A batch advances when its values are asked for: one that a few nodes did without runs through all of them at once, while
its values are in the processor's caches.

Two networks can be walked side by side: the *student*, whose layers are replaced during the walk, and the *reference*,
which stays float. Up to their first difference they share their values.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.batches import Batch, Batches
from bgd_plugin.calibration.finite import require_finite
from bgd_plugin.calibration.nodes import COMPUTING, Values, last_uses, run_node
from bgd_plugin.calibration.store import Shelf
from bgd_plugin.graph import call_input

__all__ = ["Walk"]


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
        self._student: Sequence[Values] = Shelf(store, f"{own}student")
        self._reference: Sequence[Values] = Shelf(store, f"{own}reference")
        self._given: Sequence[Values] = Shelf(store, f"{own}given")  # the user's own tensors
        for index, batch in enumerate(batches):
            values = {node.name: value for node, value in batch.placeholders(student.graph).items()}
            content = store.open(index)
            content |= {f"{own}student": values, f"{own}reference": dict(values), f"{own}given": dict(values)}
        self._places = [0] * len(batches)  # of the first node that has not run
        self._apart: list[set[str]] = [set() for _ in self._places]  # live values that differ, by name
        self._differs: set[str] = set()
        self._changed: set[str] = set()
        self._finite: dict[str, str] = {}
        self._last_use = last_uses(self.order)

    @property
    def student_values(self) -> Sequence[Values]:
        """The student's live values in each batch, which advances to the current node when it is asked for."""
        return _Reached(self, self._student)

    @property
    def reference_values(self) -> Sequence[Values]:
        """The reference's, likewise."""
        return _Reached(self, self._reference)

    @property
    def batch_count(self) -> int:
        """Number of batches."""
        return len(self._places)

    @property
    def current(self) -> fx.Node:
        """The current node."""
        return self.order[self.position]

    @property
    def place(self) -> str:
        """Its target, for error messages."""
        return str(self.current.target)

    def nodes(self, stops: Collection[str] | None = None) -> Iterator[fx.Node]:
        """Yield each node that computes something, before it runs; it runs when the next one is requested.

        Args:
            stops: names of the nodes that are wanted; None: all. What lies between two of them, and before nodes at
                which a batch's values are not asked for, runs in one go, so that batches are fetched seldom.
        """
        for position, node in enumerate(self.order):
            if node.op in COMPUTING and (stops is None or node.name in stops):
                self.position = position
                self.reach(0)  # shows what differs
                yield node
        self.position = len(self.order) - 1  # the output
        for batch in range(self.batch_count):  # the user's hooks see each batch, and what fails on one is found
            self.reach(batch)

    def require_finite(self, name: str, calls: Sequence[fx.Node]) -> None:
        """Check the inputs of a layer's calls also in the batches that have yet to reach them.

        Args:
            name: the layer's, for the error.
            calls: the current node, or later ones.
        """
        self._finite |= {call.name: name for call in calls}

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

    @torch.no_grad()
    def reference_output(self, node: fx.Node, batch: int) -> Any:
        """The reference's value at the current node, which runs in the reference now, and not once more afterwards.

        Args:
            node: the current one, which writes to no memory but its own.
            batch: index of the batch.
        """
        assert self.reference is not None and node is self.current
        self.reach(batch)
        start, theirs = time.perf_counter(), self._reference[batch]
        if node.name not in theirs:
            run_node(self.reference, node, theirs)
        self.seconds += time.perf_counter() - start
        return theirs[node.name]

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
    def reach(self, batch: int) -> None:
        """Run what lies before the current node for the batch at this index, unless it has run.

        Raises:
            CalibrationError: the network fails on the batch, or a layer's inputs are not finite.
        """
        first, self._places[batch] = self._places[batch], self.position
        if first == self.position:
            return
        start = time.perf_counter()
        mine, theirs, given = self._student[batch], self._reference[batch], self._given[batch]
        for node in self.order[first : self.position]:
            if node.op in COMPUTING:
                if node.name in self._finite:
                    require_finite(mine[call_input(node).name], self._finite[node.name])
                self._run(node, mine, theirs, given, self._apart[batch])
        self.seconds += time.perf_counter() - start

    def _run(self, node: fx.Node, mine: Values, theirs: Values, given: Values, apart: set[str]) -> None:
        """Run a node for one batch, in the float network only where its value may be another one."""
        at_target = node.op in ("call_module", "get_attr") and str(node.target) in self._changed
        differs = at_target or node.name in self._changed or any(n.name in apart for n in node.all_input_nodes)
        run_node(self.student, node, mine, protected=(given, theirs) if differs else (given,))
        if differs:
            apart.add(node.name)
        if self.reference is not None and differs:
            if node.name not in theirs:  # it may have run before, for its outputs
                run_node(self.reference, node, theirs, protected=(given, mine))
            # a value written in place is now two values as well
            apart.update(name for name in mine if mine[name] is not theirs.get(name))
        elif self.reference is not None:
            theirs.update({name: value for name, value in mine.items() if name not in apart})
        if differs:
            self._differs |= apart
        for dead in self._last_use.get(node.name, ()):
            mine.pop(dead, None)
            theirs.pop(dead, None)
            apart.discard(dead)


class _Reached(Sequence[Values]):
    """The live values of one network in each batch."""

    def __init__(self, walk: Walk, values: Sequence[Values]) -> None:
        self._walk, self._values = walk, values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        """Those of a batch, at the current node."""
        self._walk.reach(index)
        return self._values[index]

    def __iter__(self) -> Iterator[Values]:
        return (self[index] for index in range(len(self)))
