"""Calibration of a network that is not a graph: it is run again for each layer, and each time only what is new.

Without nodes there are no live values to go on from. But a network is made of modules, and what a module gave can stand
for its run. So each run goes up to the layers whose turn it is; modules whose layers are all done answer with what they
gave in an earlier run, and are not computed again. However many layers there are, each module is computed once in the
compressed network and once in the float one, but for operators between the layers of one block, such as attention.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch, Batches
from bgd_plugin.calibration.inputs import CollectedInputs, SharedInputs
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.partial import PartialRun
from bgd_plugin.calibration.pieces import Kept, Pieces, freed, revived
from bgd_plugin.calibration.recording import ANSWER, Recording, fingerprint, recorded, same_print
from bgd_plugin.calibration.store import BatchStore
from bgd_plugin.errors import CalibrationError
from bgd_plugin.pq.blocks import Geometry

__all__ = ["Rerun"]

_Call = tuple[Tensor, Geometry]
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


class Rerun:
    """The compressed network and the float one, run as often as something is asked of them.

    Layers and norms are to be asked for in their order: what comes before is taken to be done.

    The compressed network follows the float one's decisions (see `calibration.replay`), so that both come to the same
    layers, on the same samples.

    Args:
        student: the network whose layers are replaced on the way.
        reference: the same network, float; the student itself where nothing is replaced.
        batches: the calibration data.
        weights: of the layers, by name.
        norms: paths of the batch norms.
        finishes: whether `finish` will be called.

    Attributes:
        order: names of layers and paths of batch norms in the order in which they first run.
        seconds: spent in runs.
        place: what is asked for at present, for errors.
        strayed: layers where the compressed network came to other operators than the float one, so that their inputs
            could not be compared.
        is_whole: runs are of the whole network, since what modules gave did not suffice to come to the same inputs.
    """

    def __init__(
        self,
        student: nn.Module,
        reference: nn.Module,
        batches: Sequence[Batch],
        weights: Mapping[str, Tensor],
        norms: Sequence[str],
        *,
        finishes: bool = False,
    ) -> None:
        self.student, self.reference = student, reference
        # the float network by itself is run once for both
        self._sides = {"reference": reference} if student is reference else {"student": student, "reference": reference}
        self.batches = Batches.of(batches)
        self._weights, self._norms = weights, set(norms)
        self.seconds = 0.0
        self.place = ""
        self.strayed: set[str] = set()
        self.is_whole = False
        store = self.batches.store
        self._own = store.claim(self, [student, reference])
        self._recordings = [self._recorded(batch, norms) for batch in range(len(self.batches))]
        self._pieces = Pieces(self._recordings)
        self.order = self._pieces.order
        self._stored: list[set[str]] = [set() for _ in self._recordings]
        self._always_done = set() if finishes else {ANSWER}
        self._group: list[str] = []
        self._shared: SharedInputs | None = None
        self._blanks: dict[Any, Tensor] = {}
        for batch in range(len(self.batches)):
            store.open(batch).update({f"{self._own}{side} kept": {} for side in self._sides})

    def times(self, name: str) -> int:
        """How often a layer or norm runs in the calibration data."""
        return sum(recording.counts[name] for recording in self._recordings)

    def runs_twice(self, name: str) -> bool:
        """Whether something runs more than once in a batch."""
        return any(recording.counts[name] > 1 for recording in self._recordings)

    def together(self, name: str) -> list[str]:
        """The layers that are fitted to one and the same input, this one among them."""
        return self._group if name in self._group else self._pieces.together(name)

    def inputs(self, name: str, *, paired: bool = True) -> CollectedInputs:
        """The inputs of a layer, kept until another one's turn comes.

        Args:
            name: the layer's.
            paired: whether the float network's are wanted, too; else they are the compressed network's.
        """
        if name not in self._group:
            self._group = self._pieces.together(name)
            self._shared = SharedInputs(name=name) if len(self._group) > 1 else None
            self._collect(self._group)
        student, reference = (self._calls(side, name) for side in ("student", "reference"))
        return CollectedInputs(name, student, reference if paired else student, self._shared)

    def norm_inputs(self, path: str) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs of a batch norm in the compressed and in the float network, batch by batch."""
        self._group = [path]
        self._collect(self._group)
        student, reference = (
            [x for calls in self._calls(side, path) for x, _ in calls] for side in ("student", "reference")
        )
        return student, reference

    def blocks(self, layers: Collection[str], most: int) -> list[str]:
        """Modules of a few layers each that stand for their runs, in order: see `Pieces.blocks`."""
        return self._pieces.blocks(layers, most)

    def block_runs(self, path: str) -> list[tuple[tuple[Any, Any], Any]]:
        """For each batch in which a module runs: what the compressed network gives it, and the float one's output.

        All layers before it are taken to be done. Nothing where what modules gave did not suffice (`is_whole`).
        """
        position = self._pieces.first(path)
        finished, done = self._pieces.finished(position), {*self.order[:position], *self._always_done}
        watched = {name: self._weights[name] for name in self.order[position : position + 1] if name in self._weights}
        result = []
        for batch, recording in enumerate(self._recordings):
            content = self.batches.store.open(batch)
            runs = {}
            for side, network in self._sides.items():
                outputs: Kept = content[f"{self._own}{side} kept"]
                with self._timed(batch):
                    run = PartialRun(
                        network, self.batches[batch], recording, [*watched], watched, outputs, finished, self._blanks
                    )
                    runs[side] = run.up_to(path)
            if self.is_whole or not self._is_as_recorded(recording, runs["reference"]):
                self.is_whole = True
                return []
            self._stored[batch] |= runs["reference"].stored
            self._keep(batch, content, runs, done)
            mine, theirs = runs[self._side("student")], runs["reference"]
            if mine.given is not None and theirs.given is not None and not mine.strayed:
                result.append((mine.given, theirs.answer))
        return result

    def _calls(self, side: str, name: str) -> _Calls:
        return _Calls(self.batches.store, f"{self._own}{self._side(side)} inputs", name)

    def _side(self, side: str) -> str:
        return side if side in self._sides else "reference"

    def finish(self, batch: int) -> Any:
        """The compressed network's answer to one batch. Gradients flow."""
        held: Kept = {} if self.is_whole else self.batches.store.open(batch)[f"{self._own}{self._side('student')} kept"]

        def answer(path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return revived(held[path], self._blanks) if path in held else run_module(module, args, kwargs)

        with intercepted(self.student, held, answer):
            return self.batches[batch].call(self.student)

    def _recorded(self, batch: int, norms: Sequence[str]) -> Recording:
        with self._timed(batch):
            return recorded(self.reference, self.batches[batch], self._weights, norms)

    def _collect(self, names: Sequence[str]) -> None:
        """Run up to some layers, or a norm, and keep what they compute on."""
        self.place = names[0]
        position = self.order.index(names[0])
        done = {*self.order[:position], *self._always_done}
        finished = set() if self.is_whole else self._pieces.finished(position)
        weights = {name: self._weights[name] for name in names if name in self._weights}
        for batch, recording in enumerate(self._recordings):
            content = self.batches.store.open(batch)
            runs = {}
            for side, network in self._sides.items():
                outputs: Kept = {} if self.is_whole else content[f"{self._own}{side} kept"]
                with self._timed(batch):
                    run = PartialRun(
                        network, self.batches[batch], recording, names, weights, outputs, finished, self._blanks
                    )
                    runs[side] = run.go()
            if not self.is_whole and not self._is_as_recorded(recording, runs["reference"]):
                self.is_whole = True  # from the first batch on: what was kept cannot be relied on
                self._collect(names)
                return
            self._stored[batch] |= runs["reference"].stored
            self._keep(batch, content, runs, done)

    def _keep(self, batch: int, content: dict[str, Any], runs: Mapping[str, PartialRun], done: set[str]) -> None:
        """Hold the inputs that two runs have seen, and of what modules gave only what is still needed."""
        mine, theirs = (runs[self._side(side)].calls for side in ("student", "reference"))
        has_strayed = any(run.strayed for run in runs.values())
        for name in mine:
            if has_strayed or [x.shape for x, _ in mine[name]] != [x.shape for x, _ in theirs[name]]:
                self.strayed |= {name} if has_strayed else set()
                theirs[name] = mine[name]
        for side in self._sides:
            outputs = {} if self.is_whole else content[f"{self._own}{side} kept"]
            content[f"{self._own}{side} kept"] = freed(
                self._pieces, batch, outputs, done=done, stored=self._stored[batch]
            )
            content[f"{self._own}{side} inputs"] = runs[side].calls

    def _is_as_recorded(self, recording: Recording, run: PartialRun) -> bool:
        """Whether the float network came to the inputs that it has when it is run as a whole."""
        layers = {name: calls for name, calls in run.calls.items() if name in self._weights}
        return all(
            same_print([fingerprint(x) for x, _ in calls], recording.prints.get(name, []))
            for name, calls in layers.items()
        )

    @contextlib.contextmanager
    def _timed(self, batch: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except _FAILURES as error:
            raise CalibrationError(f"the network fails on calibration batch {batch}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - start


class _Calls(Sequence[Any]):
    """Batch by batch, what one layer or norm computed on."""

    def __init__(self, store: BatchStore, entry: str, name: str) -> None:
        self._store, self._entry, self._name = store, entry, name

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        return self._store.open(index)[self._entry][self._name]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
