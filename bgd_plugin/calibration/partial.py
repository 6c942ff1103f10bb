"""One run of a network on one batch, up to some layers or a norm, using outputs kept by earlier runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch
from bgd_plugin.calibration.branch import BranchEnd
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.pieces import Kept, kept, revived
from bgd_plugin.calibration.recording import Recording, input_identity
from bgd_plugin.calibration.replay import Replayer
from bgd_plugin.calibration.watch import Stop, Watch
from bgd_plugin.pq.blocks import Geometry

__all__ = ["PartialRun"]

_Call = tuple[Tensor, Geometry]


class PartialRun:
    """A run that ends as soon as it has found the requested inputs.

    Args:
        network: the compressed one or the float one.
        batch: the arguments.
        recording: of the float network's whole run on this batch.
        names: the layers whose inputs are requested, or one norm.
        weights: of the layers among them, by name.
        outputs: of pieces that need not run again; this run adds to it.
        finished: the pieces whose outputs may be kept.
        blanks: see `revived`.

    Attributes:
        calls: for each name, its inputs and their geometries.
        stored: the pieces whose outputs this run has added.
        strayed: whether this run executed other operators than the recorded one.
        given: the arguments of the piece up to which `up_to` ran; None if the run did not reach it.
        answer: the output of that piece.
        skip: what the output of the only layer is added to; None where nothing was found.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        recording: Recording,
        names: Sequence[str],
        weights: Mapping[str, Tensor],
        outputs: Kept,
        finished: Collection[str],
        blanks: dict[Any, Tensor],
    ) -> None:
        self.calls: dict[str, list[_Call]] = {name: [] for name in names}
        self.stored: set[str] = set()
        self.given: tuple[Any, Any] | None = None
        self.answer: Any = None
        self.skip: Tensor | None = None
        self._piece = ""
        self._network, self._batch, self._recording = network, batch, recording
        self._norms = set(names) - set(weights)
        self._weights = weights
        self._outputs, self._finished, self._blanks = outputs, finished, blanks
        self._left = sum(recording.counts[name] for name in names)
        # layers requested together share one input; the run ends there, so nothing can write to it
        self._end = BranchEnd() if self._left == 1 and recording.branches.issuperset(names) else None
        self._goes_on = self._left > len(names) or self._end is not None
        self._replayer = Replayer(recording.decisions)
        self._last: tuple[Tensor, Tensor, tuple[Any, ...] | None] | None = None

    @property
    def strayed(self) -> bool:
        """Whether this run executed other operators than the recorded one."""
        return self._replayer.lost

    @torch.no_grad()
    def go(self) -> PartialRun:
        """Run, unless none of the requested layers runs on this batch."""
        if self._left or self._piece:
            paths = {*self._outputs, *self._finished, *self._norms, *filter(None, (self._piece,))}
            with contextlib.suppress(Stop), contextlib.ExitStack() as stack:
                stack.enter_context(intercepted(self._network, paths, self._on_module))
                stack.enter_context(Watch(self._weights, self._on_layer, self))
                self._batch.call(self._network)
        self._last = None
        return self

    def up_to(self, piece: str) -> PartialRun:
        """Run up to a piece and through it, whatever layers are requested."""
        self._piece, self._goes_on = piece, True
        return self.go()

    def compute(self, operator: Any, args: Any, kwargs: Any) -> Any:
        """Compute one operator with the recorded decisions; the run ends before the addition of a skip connection.

        Args:
            operator: of torch.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            its result.
        """
        if self._end is None or self._left:
            return self._replayer.compute(operator, args, kwargs)
        ended = self._end.before(operator, args)
        if ended is not None:
            self.skip = ended[1].detach().clone()
            raise Stop
        blank = self._end.blank(operator, args)
        result = self._replayer.compute(operator, args, kwargs) if blank is None else blank
        self._end.after(result)
        return result

    def _on_module(self, path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if path in self._outputs:
            self._replayer.skip_to(self._recording.spans[path][1])
            return revived(self._outputs[path], self._blanks)
        if path == self._piece:
            self.given = kept((args, kwargs))
            self.answer = kept(run_module(module, args, kwargs))
            raise Stop
        if path in self._norms:
            x = args[0] if args else kwargs["input"]
            self._see(path, x, Geometry.linear())
        output = run_module(module, args, kwargs)
        if path in self._finished:
            self._outputs[path] = kept(output)
            self.stored.add(path)
        return output

    def _on_layer(self, name: str, x: Tensor, geometry: Geometry | None) -> None:
        if geometry is not None:
            self._see(name, x, geometry)

    def _see(self, name: str, x: Tensor, geometry: Geometry) -> None:
        identity = input_identity(x)
        if self._last is None or identity is None or self._last[2] != identity:
            self._last = (x, x.detach().clone() if self._goes_on else x.detach(), identity)
        self.calls[name].append((self._last[1], geometry))  # layers that share an input share the copy
        self._left -= 1
        if not self._left and self._end is not None and not self._piece:
            self._end.layer(name)
        elif not self._left and not self._piece:
            raise Stop
