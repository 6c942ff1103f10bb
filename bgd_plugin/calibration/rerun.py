"""Calibration of a network that is not a graph: it runs again for each layer, and recomputes only what is new.

Without a graph there are no live values to continue from, but a network consists of modules, and a module's output can
be kept and returned in place of another run. So each run stops at the layers to be fitted next; a module whose layers
are all fitted returns its kept output. However many layers there are, each module is computed once in the compressed
network and once in the float one, except for operators between the layers of one block, such as attention.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch, Batches, given_number
from bgd_plugin.calibration.course import shapes_of
from bgd_plugin.calibration.inputs import CollectedInputs, SharedInputs
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.partial import PartialRun
from bgd_plugin.calibration.pieces import Kept, Pieces, freed, revived
from bgd_plugin.calibration.recording import ANSWER, Recording, Records, recorded
from bgd_plugin.calibration.store import BatchStore
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import module_or_none, state_kept
from bgd_plugin.pq.blocks import Geometry

__all__ = ["Rerun"]

_Call = tuple[Tensor, Geometry]
_FAILURES = (RuntimeError, TypeError, ValueError, IndexError, AttributeError, KeyError)


class Rerun:
    """The compressed network and the float one, run again whenever values of a layer or norm are requested.

    Request layers and norms in `order`: everything before the requested one counts as finished.

    The compressed network follows the float one's decisions (see `calibration.replay`), so that both reach the same
    layers with the same samples.

    Args:
        student: the network whose layers are replaced during calibration.
        reference: the same network, float; the student itself if nothing is replaced.
        batches: the calibration data.
        weights: of the layers, by name.
        norms: paths of the batch norms.
        finishes: whether `finish` will be called.
        records: of another walk over the same batches, with a network, layers and norms of the same names and the same
            float weights; None: a run of the network on each batch makes them.

    Attributes:
        order: names of layers and paths of batch norms in the order in which they first run.
        seconds: time spent in runs.
        place: the layer or norm requested last, for error messages.
        strayed: layers before which the compressed network ran other operators than the float one, so that their inputs
            could not be compared.
        is_whole: whether each run is of the whole network, because with kept outputs it did not reproduce the inputs.
        records: of the float network's runs.
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
        records: Records | None = None,
    ) -> None:
        self.student, self.reference = student, reference
        # one run serves both if they are the same network
        self._sides = {"reference": reference} if student is reference else {"student": student, "reference": reference}
        self.batches = Batches.of(batches)
        self._weights, self._norms = weights, set(norms)
        self.seconds = 0.0
        self.place = ""
        self.strayed: set[str] = set()
        self.is_whole = False
        store = self.batches.store
        self._own = store.claim(self, [student, reference])
        self.records = Records() if records is None else records
        self._recordings = self.records.runs
        for batch in range(len(self._recordings), len(self.batches)):
            self._recordings.append(self._recorded(batch, norms))
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
        """How often the layer or norm of this name runs in the calibration data."""
        return sum(recording.counts[name] for recording in self._recordings)

    def runs_twice(self, name: str) -> bool:
        """Whether the layer or norm of this name runs more than once in a batch."""
        return any(recording.counts[name] > 1 for recording in self._recordings)

    def together(self, name: str) -> list[str]:
        """The names of the layers that have the same input as the one of this name, itself included."""
        return self._group if name in self._group else self._pieces.together(name)

    def inputs(self, name: str, *, paired: bool = True) -> CollectedInputs:
        """The inputs of a layer, kept until another layer or norm is requested.

        Args:
            name: the layer's.
            paired: whether to give the float network's inputs too; otherwise the compressed network's stand for them.
        """
        if name not in self._group:
            self._group = self._pieces.together(name)
            self._shared = SharedInputs(name=name) if len(self._group) > 1 else None
            self._collect(self._group)
        student, reference = (self._calls(side, name) for side in ("student", "reference"))
        return CollectedInputs(name, student, reference if paired else student, self._shared)

    def skip(self, name: str) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]] | None:
        """The skip connection behind a layer: its drift, and its values in the float network.

        Args:
            name: of the layer whose inputs were asked for last.

        Returns:
            for each batch, by index, the float network's values minus the compressed one's, and the float network's,
            both in the shape of the layer's output; None where there is no such skip.
        """
        sides = [_Calls(self.batches.store, f"{self._own}{self._side(s)} skip", "") for s in ("student", "reference")]
        if self._group != [name]:
            return None
        for mine, theirs in zip(*sides, strict=True):
            if mine is None or theirs is None or mine.shape != theirs.shape:
                return None
        return lambda batch: sides[1][batch] - sides[0][batch], lambda batch: sides[1][batch]

    def norm_inputs(self, path: str) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs `[N, C, ...]` of the batch norm at `path` in the compressed and in the float network, by batch."""
        self._group = [path]
        self._collect(self._group)
        student, reference = (
            [x for calls in self._calls(side, path) for x, _ in calls] for side in ("student", "reference")
        )
        return student, reference

    def blocks(self, layers: Collection[str], most: int) -> list[str]:
        """Paths of the modules to reconstruct as blocks, with up to `most` of the layers each: see `Pieces.blocks`."""
        return self._pieces.blocks(layers, most)

    def block_runs(self, path: str) -> list[tuple[tuple[Any, Any], Any]]:
        """The arguments of the module at `path` in the compressed network, and its output in the float network.

        All layers before it count as finished.

        Returns:
            a pair for each batch in which the module runs; empty if kept outputs do not reproduce its inputs
            (`is_whole`).

        Raises:
            CalibrationError: the network fails on a batch.
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
                    with self._fresh(network):
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
        """The compressed network's output for the batch at this index. Gradients are kept."""
        held: Kept = {} if self.is_whole else self.batches.store.open(batch)[f"{self._own}{self._side('student')} kept"]

        def answer(path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return revived(held[path], self._blanks) if path in held else run_module(module, args, kwargs)

        with self._fresh(self.student), intercepted(self.student, held, answer):
            return self.batches[batch].call(self.student)

    def _recorded(self, batch: int, norms: Sequence[str]) -> Recording:
        """The recording of a run on this batch, or of one that takes the same course."""
        shapes, records = shapes_of(self.batches[batch]), self.records
        if shapes in records.fixed and not records.written:
            return records.fixed[shapes].borrowed()
        with self._timed(batch), state_kept(self.reference.named_modules()) as written:
            recording = recorded(self.reference, self.batches[batch], self._weights, norms)
        records.written |= written
        if shapes is not None and recording.is_fixed:
            records.fixed.setdefault(shapes, recording)
        return recording

    def _fresh(self, network: nn.Module) -> AbstractContextManager[Any]:
        """Each run begins with the network's state as it came, whichever runs there have been before."""
        parts = ((path, module_or_none(network, path)) for path in self.records.written)
        return state_kept([(path, module) for path, module in parts if module is not None])

    def _collect(self, names: Sequence[str]) -> None:
        """Run up to some layers, or a norm, and keep their inputs."""
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
                    with self._fresh(network):
                        runs[side] = run.go()
            if not self.is_whole and not self._is_as_recorded(recording, runs["reference"]):
                self.is_whole = True  # and again from the first batch: the kept outputs are not reliable
                self._collect(names)
                return
            self._stored[batch] |= runs["reference"].stored
            self._keep(batch, content, runs, done)

    def _keep(self, batch: int, content: dict[str, Any], runs: Mapping[str, PartialRun], done: set[str]) -> None:
        """Keep the inputs found by the two runs, and only those kept outputs that are still needed."""
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
            content[f"{self._own}{side} skip"] = {"": runs[side].skip}

    def _is_as_recorded(self, recording: Recording, run: PartialRun) -> bool:
        """Whether the float network's inputs are those of its whole run."""
        return recording.agrees({name: own for name, own in run.calls.items() if name in self._weights}, run.strayed)

    @contextlib.contextmanager
    def _timed(self, batch: int) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except _FAILURES as error:
            number = given_number(self.batches, batch)
            raise CalibrationError(f"the network fails on calibration batch {number}: {error}") from error
        finally:
            self.seconds += time.perf_counter() - start


class _Calls(Sequence[Any]):
    """The inputs of one layer or norm, batch by batch."""

    def __init__(self, store: BatchStore, entry: str, name: str) -> None:
        self._store, self._entry, self._name = store, entry, name

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: Any) -> Any:
        return self._store.open(index)[self._entry][self._name]

    def __iter__(self) -> Iterator[Any]:
        return (self[index] for index in range(len(self)))
