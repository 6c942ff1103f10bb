"""One of the two networks that a walk runs, and the outputs of its pieces that are kept from run to run."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batches
from bgd_plugin.calibration.partial import PartialRun, Request, output_of
from bgd_plugin.calibration.pieces import Kept, Pieces, freed
from bgd_plugin.calibration.recording import Recording
from bgd_plugin.calibration.returned import Returned
from bgd_plugin.graph import module_or_none, state_kept

__all__ = ["Side"]


class Side:
    """A network, run again and again on each batch.

    Args:
        network: the compressed one or the float one.
        batches: the calibration data.
        recordings: of the float network's runs, by batch.
        pieces: of the network.
        prefix: of the entries in the content of a batch.
        written: paths of the modules to whose state the network's code writes.
        done: readers of values that never run again.
        ends: whether the output of a layer that was asked for is computed from the inputs that were found, where the
            piece around it returns it; the layer then must be finished before another one is asked for.

    Attributes:
        network: as it was given.
        ahead: for each batch, the place in the pieces' order before which all inputs have been found.
        blanks: see `revived`.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        recordings: Sequence[Recording],
        pieces: Pieces,
        *,
        prefix: str,
        written: Collection[str],
        done: Collection[str],
        ends: bool,
    ) -> None:
        self.network = network
        self.ahead = [0] * len(batches)
        self._batches, self._recordings, self._pieces = batches, recordings, pieces
        self._entry, self._found = f"{prefix} kept", f"{prefix} found"
        self._written, self._done, self._ends = written, done, ends
        self._stored: list[set[str]] = [set() for _ in self.ahead]
        self._inside: list[set[str]] = [set() for _ in self.ahead]  # of pieces that are kept: they do not run
        self._due: dict[int, tuple[str, torch.Size, str, Returned]] = {}
        self.blanks: dict[Any, Tensor] = {}
        for batch in range(len(batches)):
            batches.store.open(batch)[self._entry] = {}

    def kept(self, batch: int) -> Kept:
        """The outputs that stand for runs on the batch at this index."""
        result: Kept = self._batches.store.open(batch)[self._entry]
        return result

    def go_back(self, place: int, *, is_sure: bool = False) -> None:
        """Forget what was found from this place in the pieces' order on, and what is kept on those batches.

        Args:
            place: in the order.
            is_sure: whether something was found from there on in all batches, or only where `ahead` says so.
        """
        for batch, ahead in enumerate(self.ahead):
            if is_sure or ahead > place:
                self.ahead[batch] = min(ahead, place)
                self._stored[batch].clear()
                self._inside[batch].clear()
                self._due.pop(batch, None)
                self._batches.store.open(batch)[self._entry] = {}

    def fresh(self) -> AbstractContextManager[Any]:
        """Each run begins with the network's state as it came, whichever runs there have been before."""
        parts = ((path, module_or_none(self.network, path)) for path in self._written)
        return state_kept([(path, module) for path, module in parts if module is not None])

    def run(self, batch: int, request: Request, place: int, *, piece: str = "", is_whole: bool = False) -> PartialRun:
        """Run on the batch at this index, and keep those outputs that later runs need.

        Args:
            batch: the index.
            request: what to find.
            place: in the pieces' order, of the first one that is requested; what comes before is finished.
            piece: up to which to run; "" for none.
            is_whole: whether to run the whole network, and to keep nothing.
        """
        content, stored = self._batches.store.open(batch), self._stored[batch]
        outputs: Kept = {} if is_whole else content[self._entry]
        recording, arguments = self._recordings[batch], self._batches[batch]
        end = place + len(request.names) if request.through else place
        finished: set[str] = set() if is_whole else self._pieces.finished(end) - self._inside[batch]
        due = None if is_whole or request.through or piece else self._returning(batch, request)
        around = request.through if due is None else due[0]
        with self.fresh():
            if not is_whole:
                self._complete_(batch, content, place)
            run = PartialRun(
                self.network,
                arguments,
                recording,
                request,
                outputs,
                finished - self._pieces.inside(around),
                self.blanks,
            )
            run = run.up_to(piece) if piece else run.go()
        if due is not None and request.names[0] in run.shapes:
            self._due[batch] = (request.names[0], run.shapes[request.names[0]], *due)
        if request.through:
            self.ahead[batch] = end
        stored |= run.stored
        self._inside[batch].update(*map(self._pieces.inside, run.stored))
        done = {*self._pieces.order[:end], *self._done}
        content[self._entry] = {} if is_whole else freed(self._pieces, batch, outputs, done=done, stored=stored)
        return run

    def _returning(self, batch: int, request: Request) -> tuple[str, Returned] | None:
        """The piece that returns the requested layer's output, if its output is to be computed from what is found."""
        is_layer = self._ends and request.alone == request.names
        return self._pieces.returning(batch, request.names[0]) if is_layer else None

    def _complete_(self, batch: int, content: dict[str, Any], place: int) -> None:
        """Keep the output of the piece that returns what the layer before this place returns."""
        name, shape, path, returned = self._due.pop(batch, ("", torch.Size(), "", None))
        module = module_or_none(self.network, name) if name else None
        if module is None or returned is None or self._pieces.order.index(name) >= place:
            return
        ((x, _),) = content[self._found]["calls"][name]
        output = output_of(module, x.view(shape))
        if isinstance(output, Tensor):
            content[self._entry][path] = returned.holding(output.detach())
            self._stored[batch].add(path)
            self._inside[batch] |= self._pieces.inside(path)
