"""Calibration of a network that is not a graph: run it again, up to the layer whose turn it is.

Without nodes there are no live values to go on from. Each layer, and each batch norm, costs a run of the compressed
network and one of the float network over the calibration data, up to the place where it stands; that is half a run on
average, where a graph needs one run for all layers together.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch
from bgd_plugin.calibration.inputs import CollectedInputs
from bgd_plugin.calibration.replay import Decisions, Recorder, Replayer
from bgd_plugin.calibration.watch import OnCall, Stop, Watch, weight_key
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import module_at
from bgd_plugin.pq.blocks import Geometry

__all__ = ["Rerun"]

_LOOKED_UP = "looked up: "  # what an embedding does is no input that a fit could use
_Call = tuple[Tensor, Geometry]


class Rerun:
    """The compressed network and the float one, run as often as something is asked of them.

    The compressed network follows the float one's decisions (see `calibration.decisions`), so that both come to
    the same layers, on the same samples.

    Args:
        student: the network whose layers are replaced on the way.
        reference: the same network, float.
        batches: the calibration data.
        weights: of the layers, by name.
        norms: paths of the batch norms.

    Attributes:
        order: names of layers and paths of batch norms in the order in which they first run.
        seconds: spent in runs.
        place: what is asked for at present, for errors.
        strayed: layers where the compressed network came to other operators than the float one, so that their inputs
            could not be compared.
    """

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        batches: Sequence[Batch],
        weights: Mapping[str, Tensor],
        norms: Sequence[str],
    ) -> None:
        self.student, self.reference, self.batches = student, reference, batches
        self._weights = weights
        self.seconds = 0.0
        self.place = ""
        self.strayed: set[str] = set()
        self.order: list[str] = []
        self._counts: list[Counter[str]] = []
        self._recorders: list[Recorder] = []
        for batch in range(len(batches)):
            self._record(batch, norms)

    def times(self, name: str) -> int:
        """How often a layer or norm runs in the calibration data."""
        return sum(counts[name] for counts in self._counts)

    def runs_twice(self, name: str) -> bool:
        """Whether something runs more than once in a batch."""
        return any(counts[name] > 1 for counts in self._counts)

    def inputs(self, name: str, *, paired: bool) -> CollectedInputs:
        """The inputs of a layer, kept until its turn is over.

        Args:
            name: the layer's.
            paired: whether the float network's are wanted, too.
        """
        self.place = name
        mine = [self._calls(self.student, batch, name) for batch in range(len(self.batches))]
        theirs = mine
        if paired:
            theirs = [self._calls(self.reference, batch, name) for batch in range(len(self.batches))]
            for batch, (own, other) in enumerate(zip(mine, theirs, strict=True)):
                if [x.shape for x, _ in own] != [x.shape for x, _ in other] or name in self.strayed:
                    theirs[batch] = own

        return CollectedInputs(name, mine, theirs)

    def norm_inputs(self, path: str) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of a batch norm in the compressed and in the float network, batch by batch."""
        student, reference = (
            [x for batch in range(len(self.batches)) for x in self._norm_input(network, batch, path)]
            for network in (self.student, self.reference)
        )
        return student, reference

    def _record(self, batch: int, norms: Sequence[str]) -> None:
        """One run of the float network: the order of its layers, and its decisions."""
        seen: list[str] = []
        recorder = Recorder()
        with contextlib.ExitStack() as hooks:
            for path in norms:
                hooks.enter_context(_before(module_at(self.reference, path), functools.partial(_note, seen, path)))
            watch = self._watch(
                self._weights, lambda name, x, geometry: seen.append(name if geometry else _LOOKED_UP + name), recorder
            )
            self._run(self.reference, batch, watch)
        self._counts.append(Counter(seen))
        seen = [name.removeprefix(_LOOKED_UP) for name in seen]
        self._recorders.append(recorder)
        self.order = _merged(self.order, list(dict.fromkeys(seen)))

    def _calls(self, network: nn.Module, batch: int, name: str) -> list[_Call]:
        """What one layer computes on in one batch."""
        calls: list[_Call] = []
        wanted = self._counts[batch][name]
        if not wanted:
            return calls

        def on_call(_: str, x: Tensor, geometry: Geometry | None) -> None:
            if geometry is None:
                return
            calls.append((x.detach().clone(), geometry))
            if len(calls) == wanted:
                raise Stop

        replayer = Replayer(self._recorders[batch].decisions)
        self._run(network, batch, self._watch({name: self._weights[name]}, on_call, replayer))
        if replayer.lost:
            self.strayed.add(name)
        return calls

    def _norm_input(self, network: nn.Module, batch: int, path: str) -> list[Tensor]:
        values: list[Tensor] = []
        if not self._counts[batch][path]:
            return values

        def on_call(x: Tensor) -> None:
            values.append(x.detach().clone())
            raise Stop

        replayer = Replayer(self._recorders[batch].decisions)
        with _before(module_at(network, path), on_call):
            self._run(network, batch, self._watch({}, lambda *_: None, replayer))
        return values

    def _watch(self, weights: Mapping[str, Tensor], on_call: OnCall, decisions: Decisions) -> Watch:
        return Watch({weight_key(weight): name for name, weight in weights.items()}, on_call, decisions)

    @torch.no_grad()
    def _run(self, network: nn.Module, batch: int, watch: Watch) -> None:
        start = time.perf_counter()
        try:
            with watch:
                self.batches[batch].call(network)
        except Stop:
            pass
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError) as error:
            raise CalibrationError(f"the network fails on calibration batch {batch}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - start

    def finish(self, batch: int) -> Any:
        """The compressed network's answer to one batch. Gradients flow."""
        return self.batches[batch].call(self.student)


@contextlib.contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    hook = module.register_forward_pre_hook(lambda _, args: see(args[0]))
    try:
        yield
    finally:
        hook.remove()


def _note(seen: list[str], path: str, _: Tensor) -> None:
    seen.append(path)


def _merged(known: list[str], seen: list[str]) -> list[str]:
    """One order out of two: what is new comes right after what it followed."""
    result = list(known)
    place = 0
    for name in seen:
        if name in result:
            place = result.index(name) + 1
        else:
            result.insert(place, name)
            place += 1
    return result
