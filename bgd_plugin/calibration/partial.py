"""One run of a network on one batch, up to some layers or norms, using outputs kept by earlier runs."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.calibration.batches import Batch
from bgd_plugin.calibration.branch import BranchEnd
from bgd_plugin.calibration.interception import intercepted, run_module
from bgd_plugin.calibration.pieces import Kept, kept, revived
from bgd_plugin.calibration.recording import Recording
from bgd_plugin.calibration.replay import Replayer
from bgd_plugin.calibration.returned import input_identity
from bgd_plugin.calibration.watch import Stop, Watch
from bgd_plugin.pq.blocks import Geometry

__all__ = ["PartialRun", "Request", "output_of"]

_Call = tuple[Tensor, Geometry]
_aten: Any = torch.ops.aten
_EXACT = torch.float32, torch.float64


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a run is to find.

    Attributes:
        groups: of layers whose inputs are requested and that share them, and norms, one by one. What the output of a
            layer without companions is added to is looked for, too.
        weights: of the layers, by name.
        gives_products: whether to go on to the products of layers without companions: their inputs times their weight.
        through: the piece whose output is kept before the run ends; "" for none.
    """

    groups: Sequence[Sequence[str]]
    weights: Mapping[str, Tensor]
    gives_products: bool = False
    through: str = ""

    @property
    def names(self) -> list[str]:
        """Of all layers and norms."""
        return [name for group in self.groups for name in group]

    @property
    def alone(self) -> list[str]:
        """The layers without companions."""
        return [group[0] for group in self.groups if len(group) == 1 and group[0] in self.weights]


class PartialRun:
    """A run that ends as soon as it has found what is requested.

    Args:
        network: the compressed one or the float one.
        batch: the arguments.
        recording: of the float network's whole run on this batch.
        request: what to find.
        outputs: of pieces that need not run again; this run adds to it.
        finished: the pieces whose outputs may be kept.
        blanks: see `revived`.

    Attributes:
        calls: for each name, its inputs and their geometries.
        skips: for layers that are alone and end a residual branch, what their output is added to, of its shape.
        products: of layers that are alone and run once, `[positions, rows]`, if products are requested.
        shapes: of the argument of a layer's module, for layers that are alone, where the argument is the input found.
        stored: the pieces whose outputs this run has added.
        strayed: whether this run executed other operators than the recorded one.
        given: the arguments of the piece up to which `up_to` ran; None if the run did not reach it.
        answer: the output of that piece.
    """

    def __init__(
        self,
        network: nn.Module,
        batch: Batch,
        recording: Recording,
        request: Request,
        outputs: Kept,
        finished: Collection[str],
        blanks: dict[Any, Tensor],
    ) -> None:
        names, counts = request.names, recording.counts
        self.calls: dict[str, list[_Call]] = {name: [] for name in names}
        self.skips: dict[str, Tensor] = {}
        self.products: dict[str, Tensor] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.stored: set[str] = set()
        self.given: tuple[Any, Any] | None = None
        self.answer: Any = None
        self._piece, self._through = "", request.through if recording.calls[request.through] else ""
        self._network, self._batch, self._recording = network, batch, recording
        self._norms = set(names) - set(request.weights)
        self._weights = request.weights
        self._outputs, self._finished, self._blanks = outputs, finished, blanks
        self._left = sum(counts[name] for name in names)
        self._argument: tuple[str, Tensor, int] | None = None
        once = {name for name in request.alone if counts[name] == 1}
        self._once = once
        self._companions = {
            group[0]: group[1:]
            for group in request.groups
            if all(counts[name] == 1 and name in request.weights and request.weights[name].ndim == 2 for name in group)
        }
        self._known: set[str] = set()  # layers whose input was that of the one before
        self._branches = once & recording.branches
        self._multiplied = {n for n in once if request.gives_products and request.weights[n].dtype in _EXACT}
        self._end = BranchEnd()
        self._branch = self._product = ""  # the layers whose addition, and whose product, is still to come
        # layers requested together share one input; if the run ends there, nothing can write to it
        self._goes_on = bool(self._left > len(names) or self._branches or self._multiplied or self._through)
        self._replayer = Replayer(recording.decisions)
        self._last: tuple[Tensor, Tensor, tuple[Any, ...] | None] | None = None

    @property
    def strayed(self) -> bool:
        """Whether this run executed other operators than the recorded one."""
        return self._replayer.lost

    @torch.no_grad()
    def go(self) -> PartialRun:
        """Run, unless nothing that is requested runs on this batch."""
        if self._left or self._piece:
            paths = {*self._outputs, *self._finished, *self._norms, *self._once}
            paths |= {path for path in (self._piece, self._through) if path}
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
        """Compute one operator with the recorded decisions; the run may end before the addition of a skip connection.

        Args:
            operator: of torch.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Returns:
            its result.
        """
        if not self._branch and not self._product:
            return self._replayer.compute(operator, args, kwargs)
        ended = self._end.before(operator, args) if self._branch else None
        if ended is not None:
            self.skips[ended[0]] = ended[1].detach().clone()
            self._branch = ""
            self._end_if_over()
        is_read = self._left or self._product or self._through or self._piece
        blank = None if is_read or not self._branch else self._end.blank(operator, args)
        result = self._replayer.compute(operator, args, kwargs) if blank is None else blank
        self._end.after(result)
        if self._product:
            name, self._product = self._product, ""
            product = _product_of(self._weights[name], operator, args, kwargs, result)
            if product is not None:
                self.products[name] = product
            self._end_if_over()
        return result

    def _end_if_over(self) -> None:
        """End the run if nothing is to come."""
        if not (self._left or self._branch or self._product or self._through or self._piece):
            raise Stop

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
        if path in self._once and len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            self._argument = (path, args[0], _version(args[0]))
        output = run_module(module, args, kwargs)
        if path in self._finished or path == self._through:
            self._outputs[path] = kept(output)
            self.stored.add(path)
        if path == self._through:
            self._through = ""
            self._end_if_over()
        return output

    def _on_layer(self, name: str, x: Tensor, geometry: Geometry | None) -> None:
        if geometry is not None:
            self._see(name, x, geometry)

    def _see(self, name: str, x: Tensor, geometry: Geometry) -> None:
        if name in self._known:
            return
        identity = input_identity(x)
        if self._last is None or identity is None or self._last[2] != identity:
            self._last = (x, x.detach().clone() if self._goes_on else x.detach(), identity)
        companions = self._companions.get(name, ()) if geometry == Geometry.linear() else ()
        self._known |= {*companions}
        for other in (name, *companions):
            self.calls[other].append((self._last[1], geometry))  # layers that share an input share the copy
            self._left -= 1
        if self._argument is not None and self._argument[0] == name and _is_all(x, *self._argument[1:]):
            self.shapes[name] = self._argument[1].shape
        self._argument = None
        if name in self._branches:
            self._end.layer(name)
            self._branch = name
        self._product = name if name in self._multiplied else ""
        self._end_if_over()


def _product_of(weight: Tensor, operator: Any, args: Any, kwargs: Any, result: Any) -> Tensor | None:
    """A layer's inputs times its weight, `[positions, rows]`: an operator's result, less its bias.

    None where the operator has computed something else.
    """
    if weight.ndim != 2 or kwargs or operator not in (_aten.mm.default, _aten.addmm.default):
        return None
    bias, (_, matrix) = args[:-2], args[-2:]
    is_whole = matrix.data_ptr() == weight.data_ptr() and matrix.shape == weight.mT.shape
    if not is_whole or matrix.stride() != weight.mT.stride() or any(b.ndim != 1 for b in bias):
        return None
    product: Tensor = result - bias[0] if bias else result.clone()
    return product


def _is_all(x: Tensor, argument: Tensor, version: int) -> bool:
    """Whether x has the values of an argument, whose version was this one, in their order."""
    mine, theirs = input_identity(x), input_identity(argument)
    if mine is None or theirs is None or mine[:2] != theirs[:2] or x._version != version:
        return False
    return x.numel() == argument.numel() and x.is_contiguous() and argument.is_contiguous()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


@torch.no_grad()
def output_of(module: nn.Module, x: Tensor) -> Any:
    """What a layer's module returns for an input that was found, x of its argument's shape."""
    return run_module(module, (x,), {})
