"""One run of the float network on a calibration batch, and the record of what it did."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch
from bgd_plugin.calibration.branch import BranchEnd
from bgd_plugin.calibration.course import Course
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.readers import Dataflow, is_plain, tensors_in
from bgd_plugin.calibration.replay import Recorder
from bgd_plugin.calibration.returned import LastOutput, Returned, input_identity
from bgd_plugin.calibration.watch import Watch
from bgd_plugin.pq.blocks import Geometry

__all__ = ["ANSWER", "Print", "Recording", "Records", "fingerprint", "recorded", "same_print"]

ANSWER = "answer"
"""The reader of values that go into the network's output."""

_CLOSE = 1e-3

Print = tuple[tuple[int, ...], float, float]
"""Shape, mean and root mean square of an input: enough to tell whether a later run has the same input."""


@dataclass(kw_only=True)
class Recording:
    """The record of one run on one batch.

    Attributes:
        order: names of layers and paths of norms, in the order in which they ran.
        counts: how often each layer computed on an input (table look-ups not counted), and each norm ran.
        sizes: bytes of these inputs; one that a layer shares with the layer before it counts once.
        calls: how often each module ran.
        contents: for each module, the layers and norms that ran inside it.
        parents: for each module, the module inside which it ran; "" for none.
        spans: for each module, the number of decisions taken before it ran and after.
        readers: see `Dataflow.readers`; layers and norms by name, modules by path.
        unfit: modules whose output cannot replace a run: they write to their arguments, or return more than tensors.
        returned: for modules that return what the last layer in them returns, what that is.
        shares: for each layer, the layer right before it that had the same input.
        branches: layers whose output is added to a skip connection.
        prints: fingerprints of each layer's inputs.
        decisions: see `Recorder`.
        is_fixed: whether its course depends on shapes alone (see `calibration.course`).
        is_borrowed: whether it is that of another batch of these shapes; it then has no prints.
    """

    order: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sizes: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    contents: dict[str, set[str]] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)
    readers: dict[str, set[str]] = field(default_factory=dict)
    unfit: set[str] = field(default_factory=set)
    returned: dict[str, Returned] = field(default_factory=dict)
    shares: dict[str, str] = field(default_factory=dict)
    branches: set[str] = field(default_factory=set)
    prints: dict[str, list[Print]] = field(default_factory=dict)
    decisions: list[tuple[Any, list[Tensor]]] = field(default_factory=list)
    is_fixed: bool = False
    is_borrowed: bool = False

    def borrowed(self) -> Recording:
        """The same for another batch, whose run takes this course."""
        return replace(self, prints={}, is_borrowed=True)

    def agrees(self, calls: Mapping[str, Sequence[tuple[Tensor, Geometry]]], strayed: bool) -> bool:
        """Whether a later run of the network, up to some layers, gave them the same inputs as the recorded one.

        Of a run whose course was borrowed, only the number of inputs is known.

        Args:
            calls: of each layer, the inputs, of any shape, and their geometries.
            strayed: whether the run executed other operators.
        """
        if self.is_borrowed:
            return not strayed and all(len(own) == self.counts[name] for name, own in calls.items())
        prints = {name: [fingerprint(x) for x, _ in own] for name, own in calls.items()}
        return all(same_print(own, self.prints.get(name, [])) for name, own in prints.items())


@dataclass
class Records:
    """What is known of the float network's runs.

    Attributes:
        runs: of each batch.
        written: paths of the modules to whose state the network's code writes.
        fixed: recordings whose course depends on shapes alone, by `shapes_of` of their batch.
    """

    runs: list[Recording] = field(default_factory=list)
    written: set[str] = field(default_factory=set)
    fixed: dict[Hashable, Recording] = field(default_factory=dict)


@torch.no_grad()
def recorded(network: nn.Module, batch: Batch, weights: Mapping[str, Tensor], norms: Sequence[str]) -> Recording:
    """Run a network on a batch, and record the run.

    Args:
        network: float, in evaluation mode.
        batch: the arguments.
        weights: of the layers, by name, each of its layer's own shape.
        norms: paths of the batch norms.
    """
    observer = _Observer(weights, norms)
    watch = Watch(weights, observer.on_layer, observer)
    paths = [path for path, module in network.named_modules() if path and _can_be_watched(module)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(intercepted(network, paths, observer.on_module))
        stack.enter_context(watch)
        stack.enter_context(observer.course)
        answer = batch.call(network)
        observer.flow.read(ANSWER, tensors_in(answer))
    observer.recording.readers = observer.flow.readers
    observer.recording.decisions = observer.recorder.decisions
    observer.recording.is_fixed = observer.course.is_fixed and not observer.recorder.decisions
    return observer.recording


def _can_be_watched(module: nn.Module) -> bool:
    return not isinstance(module, torch.jit.ScriptModule)


class _Observer:
    """Observes the layers, modules and operators of one run, and records the network's decisions."""

    def __init__(self, layers: Collection[str], norms: Sequence[str]) -> None:
        self.recording = Recording()
        self.recorder = Recorder()
        self.flow = Dataflow()
        self.course = Course()
        self._end = BranchEnd()
        self._output = LastOutput(layers)
        self._norms = set(norms)
        self._running: list[str] = []
        self._last: tuple[str, Tensor, tuple[Any, ...] | None] | None = None

    def compute(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Compute one operator, and record it."""
        ended = self._end.before(operator, args)
        if ended is not None:
            self.recording.branches.add(ended[0])
        self.course.computes(operator, args)
        result = self.recorder.compute(operator, args, kwargs)
        self._end.after(result)
        self.flow.computed(operator, (args, kwargs), result)
        return result

    def on_layer(self, name: str, x: Tensor, geometry: Geometry | None) -> None:
        """Record that a layer computes on an input x, or (without a geometry) looks up rows of its table."""
        recording = self.recording
        self._note(name)
        if geometry is None:
            return
        recording.counts[name] += 1
        self._end.layer(name)
        self.flow.read(name, [x])
        identity = input_identity(x)
        if self._last is not None and identity is not None and self._last[2] == identity and self._last[0] != name:
            recording.shares[name] = self._last[0]
            recording.prints.setdefault(name, []).append(recording.prints[self._last[0]][-1])
        else:
            recording.prints.setdefault(name, []).append(fingerprint(x))
            recording.sizes[name] += x.nbytes
        self._last = (name, x, identity)  # x is kept alive, so that no other tensor gets its address

    def on_module(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run a module, and record it."""
        recording = self.recording
        recording.calls[path] += 1
        recording.parents[path] = self._running[-1] if self._running else ""
        given = tensors_in((args, kwargs))
        if path in self._norms:
            self._note(path)
            recording.counts[path] += 1
            recording.sizes[path] += sum(t.nbytes for t in given)
            self.flow.read(path, given)
        before, versions = len(self.recorder.decisions), [_version(t) for t in given]
        with self._within(path):
            output = run_module(module, args, kwargs)
        recording.spans[path] = (before, len(self.recorder.decisions))
        if versions != [_version(t) for t in given] or not is_plain(output):
            recording.unfit.add(path)
        returned = self._output.returned_by(path, output)
        if returned is not None:
            recording.returned[path] = returned
        self.flow.left(path, (args, kwargs), output)
        return output

    @contextlib.contextmanager
    def _within(self, path: str) -> Iterator[None]:
        self._running.append(path)
        yield
        self._running.pop()

    def _note(self, name: str) -> None:
        self.recording.order.append(name)
        for path in self._running:
            self.recording.contents.setdefault(path, set()).add(name)
        if name in self._norms:
            self.recording.contents.setdefault(name, set()).add(name)


def fingerprint(x: Tensor) -> Print:
    """The fingerprint of an input x of any shape, for `same_print`."""
    values = x.detach().float()
    size = max(1, x.numel())
    return tuple(x.shape), float(values.sum()) / size, float(torch.linalg.vector_norm(values)) / math.sqrt(size)


def same_print(one: Sequence[Print], other: Sequence[Print]) -> bool:
    """Whether one sequence of inputs equals the other, up to rounding, judged by fingerprints."""
    return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))


def _same(one: Print, other: Print) -> bool:
    scale = _CLOSE * max(one[2], other[2])
    return one[0] == other[0] and all(
        math.isclose(a, b, rel_tol=_CLOSE, abs_tol=scale) or (math.isnan(a) and math.isnan(b))
        for a, b in zip(one[1:], other[1:], strict=True)
    )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
