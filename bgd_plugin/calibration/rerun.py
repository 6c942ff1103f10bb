"""Calibration of a network that is not a graph: it runs again for each layer, and recomputes only what is new.

Without a graph there are no live values to continue from, but a network consists of modules, and a module's output can
be kept and returned in place of another run. So each run stops at the layers to be fitted next; a module whose layers
are all fitted returns its kept output. However many layers there are, each module is computed once in the compressed
network and once in the float one, except for operators between the layers of one block, such as attention, which the
compressed network may compute once more. Where a module returns what its last layer does, not even these: the output is
computed from the inputs on which that layer was fitted. The float network does not wait for fits: one run finds the
inputs of all layers of a block, if they take no more than the bound on memory; the store moves to its file what has to.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch, Batches, given_number
from bgd_plugin.calibration.course import shapes_of
from bgd_plugin.calibration.findings import Findings
from bgd_plugin.calibration.inputs import CollectedInputs, SharedInputs
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.partial import PartialRun, Request
from bgd_plugin.calibration.pieces import Kept, Pieces, revived
from bgd_plugin.calibration.recording import ANSWER, Recording, Records, recorded
from bgd_plugin.calibration.side import Side
from bgd_plugin.calibration.store import DEFAULT_BOUND_BYTES
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import state_kept

__all__ = ["Rerun"]

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
        self.batches = Batches.of(batches)
        self._weights, self._norms = weights, set(norms)
        self.seconds = 0.0
        self.place = ""
        self.strayed: set[str] = set()
        self.is_whole = False
        store = self.batches.store
        own = store.claim(self, [student, reference])
        self.records = Records() if records is None else records
        self._recordings = self.records.runs
        for batch in range(len(self._recordings), len(self.batches)):
            self._recordings.append(self._recorded(batch, norms))
        self._pieces = Pieces(self._recordings)
        self.order = self._pieces.order
        # one run serves both if they are the same network
        networks = {"reference": reference} if student is reference else {"student": student, "reference": reference}
        self._ends = student is not reference or not finishes
        self._sides = {
            side: Side(
                network,
                self.batches,
                self._recordings,
                self._pieces,
                prefix=f"{own}{side}",
                written=self.records.written,
                done=() if finishes else {ANSWER},
                ends=self._ends and not finishes,
            )
            for side, network in networks.items()
        }
        self._findings = Findings(store, own, [*self._sides])
        self._place = 0
        self._group: list[str] = []
        self._shared: SharedInputs | None = None

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
        student, reference = (self._findings.calls(side, name) for side in ("student", "reference"))
        known = self._findings.products(name) if paired and self._group == [name] else None
        count = self._findings.count(name)
        return CollectedInputs(name, student, reference if paired else student, self._shared, known, count)

    def skip(self, name: str) -> tuple[Callable[[int], Tensor], Callable[[int], Tensor]] | None:
        """The skip connection behind a layer: its drift, and its values in the float network.

        Args:
            name: of the layer whose inputs were asked for last.

        Returns:
            for each batch, by index, the float network's values minus the compressed one's, and the float network's,
            both in the shape of the layer's output; None where there is no such skip.
        """
        sides = self._findings.skips(name) if self._group == [name] else None
        if sides is None:
            return None
        mine, theirs = sides
        return lambda batch: theirs[batch] - mine[batch], lambda batch: theirs[batch]

    def norm_inputs(self, path: str) -> tuple[list[Tensor], list[Tensor]]:
        """The inputs `[N, C, ...]` of the batch norm at `path` in the compressed and in the float network, by batch."""
        self._group = [path]
        self._collect(self._group)
        student, reference = (
            [x for calls in self._findings.calls(side, path) for x, _ in calls] for side in ("student", "reference")
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
        place = self._pieces.first(path)
        self._begin(place)
        self._sides["reference"].go_back(place)
        watched, self._group = self.order[place : place + 1], []
        self._findings.clear(watched)
        requests = dict.fromkeys(self._sides, self._request([watched] if watched else []))
        result = []
        for batch in range(len(self.batches)):
            runs = None if self.is_whole else self._run(batch, watched, requests, place, path)
            if runs is None:
                return []
            mine, theirs = runs.get("student", runs["reference"]), runs["reference"]
            if mine.given is not None and theirs.given is not None and not mine.strayed:
                result.append((mine.given, theirs.answer))
        return result

    def finish(self, batch: int) -> Any:
        """The compressed network's output for the batch at this index. Gradients are kept."""
        side = self._sides.get("student", self._sides["reference"])
        held: Kept = {} if self.is_whole else side.kept(batch)

        def answer(path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return revived(held[path], side.blanks) if path in held else run_module(module, args, kwargs)

        with side.fresh(), intercepted(self.student, held, answer):
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

    def _request(self, groups: Sequence[Sequence[str]], **options: Any) -> Request:
        """Ask for the inputs of groups of layers and norms."""
        weights = {name: self._weights[name] for group in groups for name in group if name in self._weights}
        return Request(groups=groups, weights=weights, **options)

    def _begin(self, place: int) -> None:
        """What was found from this place in `order` on is found anew."""
        if place < self._place:
            for side in self._sides.values():
                side.go_back(place, is_sure=True)
        self._place = place

    def _collect(self, names: Sequence[str]) -> None:
        """Run up to some layers, or a norm, and keep their inputs.

        On batches whose recording is borrowed, the float network finds those of a whole stretch in one run. On the
        others it runs as the compressed one does, so that what was recorded shows whether kept outputs are reliable.
        """
        self.place = names[0]
        place = self.order.index(names[0])
        self._begin(place)
        near = {side: self._request([names], gives_products=self._ends and side == "reference") for side in self._sides}
        far, behind = dict(near), {side: request for side, request in near.items() if side != "reference"}
        if self._ends and not self.is_whole:
            bound = self.batches.store.bound_bytes
            most = DEFAULT_BOUND_BYTES if bound is None else min(bound, DEFAULT_BOUND_BYTES)
            groups, through = self._pieces.stretch(place, most)
            far["reference"] = self._request(groups, gives_products=True, through=through)
        self._findings.clear(names)
        ahead = self._sides["reference"].ahead
        for batch, recording in enumerate(self._recordings):
            requests = behind if place < ahead[batch] else far if recording.is_borrowed else near
            if self._run(batch, names, requests, place) is None:
                self._collect(names)  # and again from the first batch: the kept outputs are not reliable
                return

    def _run(
        self, batch: int, names: Sequence[str], requests: Mapping[str, Request], place: int, piece: str = ""
    ) -> dict[str, PartialRun] | None:
        """Run each side on a batch, and keep what is found.

        Args:
            batch: its index.
            names: the layers, or the norm, that are asked for now.
            requests: by side.
            place: of these names in `order`.
            piece: up to which to run; "" for none.

        Returns:
            by side; None if kept outputs do not reproduce the float network's inputs, which `is_whole` then tells.
        """
        runs = {}
        for side, request in requests.items():
            with self._timed(batch):
                runs[side] = self._sides[side].run(batch, request, place, piece=piece, is_whole=self.is_whole)
        recording, theirs = self._recordings[batch], runs.get("reference")
        if theirs is not None and not self.is_whole and not self._is_as_recorded(recording, theirs):
            self.is_whole = True
            self._sides["reference"].go_back(place)
            return None
        if self._findings.put(self.batches.store.open(batch), runs, names):
            self.strayed |= {*names}
        return runs

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
