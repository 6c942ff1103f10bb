"""Turn the user's calibration data into call arguments, and a network's output into logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration.store import BatchStore
from bgd_plugin.errors import CalibrationError

__all__ = ["Batch", "Batches", "Forward", "given_number", "iterate_batches", "logits_of", "require_rewalkable"]

Forward = Callable[[nn.Module, Any], Any]

_MOST_BATCHES = 4096
"""Maximum number of batches from data without a length; data that gives more is considered endless."""

_LOGITS = ("logits", "out")


@dataclass(frozen=True)
class Batch:
    """The arguments of one call to the network: positional `args` and keyword `kwargs`."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def placeholders(self, graph: fx.Graph) -> dict[fx.Node, Any]:
        """The value of each input node of a graph.

        Raises:
            CalibrationError: the graph has no such input, or a required input is missing.
        """
        nodes = [node for node in graph.nodes if node.op == "placeholder"]
        names = {str(node.target): node for node in nodes}
        unknown = sorted(set(self.kwargs) - set(names))
        if unknown or len(self.args) > len(nodes):
            raise CalibrationError(
                f"a calibration batch gives {', '.join(unknown) or f'{len(self.args)} inputs'}; the network takes "
                f"{', '.join(names)}: give a batch of these, or forward=callable(model, batch)"
            )
        values = dict(zip(nodes, self.args, strict=False)) | {names[k]: v for k, v in self.kwargs.items()}
        for node in nodes:
            if node not in values:
                if not node.args:
                    raise CalibrationError(f"a calibration batch lacks the network's input {str(node.target)!r}")
                values[node] = node.args[0]
        return values

    def call(self, model: nn.Module) -> Any:
        """The output of `model`, called with copies of the tensors, because it may modify its inputs in place."""
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, (self.args, self.kwargs))
        return model(*args, **kwargs)

    def tokens(self, logits: Tensor) -> Tensor | None:
        """Which tokens count, bool `[batch, tokens]`: the batch's `attention_mask`, if there are logits per token.

        Args:
            logits: `[batch, tokens, classes]`; None is returned for logits of another shape, or without such a mask.
        """
        mask = self.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or logits.ndim != 3 or mask.shape != logits.shape[:2] or not bool(mask.any()):
            return None
        return mask.bool()

    @property
    def size(self) -> int:
        """Number of samples in the batch: the size of its first tensor's first dimension."""
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor) and t.ndim]
        return tensors[0].shape[0] if tensors else 1


class Batches(Sequence[Batch]):
    """The calibration data, held in a store next to the networks' values for each batch.

    Args:
        store: where they lie.
        is_divisible: whether the network answers each sample of a batch by itself, so that batches may be cut.

    Attributes:
        numbers: of the caller's batches; each may lie here in several pieces.
        given: how many batches the caller gave.
    """

    def __init__(self, store: BatchStore, is_divisible: Callable[[Batch], bool] = lambda _: True) -> None:
        self.store = store
        self.numbers: list[int] = []
        self.given = 0
        self._is_divisible = is_divisible

    @classmethod
    def of(cls, batches: Iterable[Batch], memory_bytes: int | None = None) -> Batches:
        """Batches in a new store that holds `memory_bytes` in memory; batches already in a store are returned as is."""
        if isinstance(batches, Batches):
            return batches
        result = cls(BatchStore(memory_bytes))
        for batch in batches:
            result.append([batch])
        return result

    def append(self, pieces: Iterable[Batch]) -> None:
        """Add a batch of the caller's, in pieces."""
        for piece in pieces:
            self.store.append({"batch": (piece.args, piece.kwargs)})
            self.numbers.append(self.given)
        self.given += 1

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, index: Any) -> Any:
        """One batch."""
        return Batch(*self.store.open(index)["batch"])

    def __iter__(self) -> Iterator[Batch]:
        """One batch after another."""
        return (self[index] for index in range(len(self)))

    def may_be_cut(self) -> bool:
        """Whether batches may be cut: the network answers each sample by itself."""
        return self._is_divisible(self[0])

    def replace(self, index: int, batch: Batch) -> None:
        """Put another batch in the place of the one at this index."""
        self.store.open(index)["batch"] = (batch.args, batch.kwargs)

    def remove(self, indices: Sequence[int]) -> None:
        """Drop the batches at these indices."""
        self.store.remove(indices)
        gone = set(indices)
        self.numbers = [number for index, number in enumerate(self.numbers) if index not in gone]


def given_number(batches: Sequence[Batch], index: int) -> int:
    """The number of the caller's batch from which the batch at this index comes, for messages."""
    return batches.numbers[index] if isinstance(batches, Batches) else index


def iterate_batches(
    calibration: Iterable[Any], model: nn.Module, *, device: torch.device, forward: Forward | None
) -> Iterator[Batch]:
    """The batches of one pass over the calibration data.

    Args:
        calibration: an iterable of tensors, of sequences whose first item is the input, or of mappings of keyword
            arguments; of anything with `forward`.
        model: the network.
        device: where the batches go.
        forward: `forward(model, batch)` calls the model on an item; None: items have one of the forms above.

    Raises:
        CalibrationError: not an iterable of batches, a batch of an unsupported form or without samples, or endless
            data.
    """
    if isinstance(calibration, (Tensor, str, Mapping)) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            f"calibration is a {type(calibration).__name__}: give an iterable of batches, for one batch [batch]"
        )
    is_open_ended = not hasattr(calibration, "__len__")
    for index, item in enumerate(calibration):
        if is_open_ended and index >= _MOST_BATCHES:
            raise CalibrationError(
                f"the calibration data has no length and gave more than {_MOST_BATCHES} batches: give a list or a "
                "DataLoader, or limit it, for example with itertools.islice"
            )
        batch = _captured(model, item, forward) if forward else _batch(item, index)
        if not batch.size:
            raise CalibrationError(f"calibration batch {index} contains no samples")
        yield _on(batch, device)


def require_rewalkable(calibration: Iterable[Any], purpose: str) -> None:
    """Reject an iterator if the data is needed more than once.

    Args:
        calibration: the caller's data.
        purpose: what needs the data again, for the message.

    Raises:
        CalibrationError: `calibration` is an iterator.
    """
    if isinstance(calibration, Iterator):
        raise CalibrationError(
            f"the calibration data is a {type(calibration).__name__}, which can be iterated over only once, but "
            f"{purpose} needs it again: give a DataLoader or a list of batches"
        )


def logits_of(output: Any) -> Tensor:
    """The logits in a network's output: a tensor, a field or item `logits` or `out`, or a sequence's first tensor.

    Returns:
        `[batch, classes]`, `[batch, tokens, classes]` or `[batch, classes, height, width]`.

    Raises:
        CalibrationError: the output contains none of these.
    """
    if isinstance(output, Tensor):
        return output
    for name in _LOGITS:
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        return output[0]
    raise CalibrationError(
        f"the network returns a {type(output).__name__} without logits: distillation and finetuning need a tensor, "
        f"a first tensor, or a field named {' or '.join(_LOGITS)}; "
        "set distillation=None and finetuning=None to skip them"
    )


def _batch(item: Any, index: int) -> Batch:
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping) and item and all(isinstance(key, str) for key in item):
        return Batch((), dict(item))
    if isinstance(item, Sequence) and item and isinstance(item[0], Tensor):
        return Batch((item[0],))
    if isinstance(item, Sequence) and item and _are_tensors(item[0]):
        return Batch((list(item[0]),))
    raise CalibrationError(
        f"calibration batch {index} is a {type(item).__name__}: give a tensor, a sequence whose first item is the "
        "input tensor (or a list of tensors, for detectors), or a mapping of keyword arguments; for anything else pass "
        "forward=callable(model, batch)"
    )


def _are_tensors(value: Any) -> bool:
    """Whether a value is a list of tensors, the form in which detectors take images."""
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, Tensor) for x in value)


class _Called(BaseException):
    """Carries the call's arguments out of the user's `forward`; not an Exception, so that no handler swallows it."""


class _Recorder(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = [model]  # in a list: not a submodule

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise _Called(args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_model"][0], name)


def _captured(model: nn.Module, item: Any, forward: Forward) -> Batch:
    """The arguments with which the user's `forward` calls the network.

    Raises:
        CalibrationError: `forward` did not call the network.
    """
    try:
        forward(_Recorder(model), item)
    except _Called as call:
        args, kwargs = call.args
        return Batch(args, kwargs)
    raise CalibrationError("forward(model, batch) returned without calling the model")


def _on(batch: Batch, device: torch.device) -> Batch:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(device), (batch.args, batch.kwargs))
    return Batch(args, kwargs)
