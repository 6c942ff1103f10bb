"""The content of a network's file, computed once: `quantize` reports its length, `save` writes it.

What was computed is taken again only for the same network with the same values, told by a digest of its whole state.
Neither identities nor version counters of tensors would do: `parameter.data` is written without a trace in them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bgd_plugin.files.format import State, Stored, file_size, stored_state
from bgd_plugin.files.layer_entries import layer_header
from bgd_plugin.files.same_tensor import identity
from bgd_plugin.support.digest import digest

__all__ = ["content_of", "measured_size"]

_known: dict[int, tuple[weakref.ref[nn.Module], str, Stored]] = {}
"""By the network's id, with a reference that tells whether the id is still its own."""


def measured_size(model: nn.Module) -> int:
    """Length of a network's file in bytes; its content is kept until it is written or the network is gone."""
    state = State.of(model)
    content = stored_state(state)
    if _has_values(state):
        number = id(model)
        _known[number] = weakref.ref(model, lambda _: _known.pop(number, None)), _print(state), content
    return file_size(content)


def content_of(model: nn.Module) -> Stored:
    """The tensors and the header of a network's file, as `stored` gives them; what is kept of it is given away.

    Raises:
        CheckpointError: the state contains something other than tensors.
    """
    state = State.of(model)
    known = _known.pop(id(model), None)
    if known is None or known[0]() is not model or not _has_values(state) or _print(state) != known[1]:
        return stored_state(state)
    return known[2]


def _has_values(state: State) -> bool:
    """Whether all of a state can be told by its bytes."""
    return all(
        isinstance(value, Tensor) and value.layout is torch.strided and not value.is_meta and not value.is_quantized
        for value in state.tensors.values()
    )


def _print(state: State) -> str:
    return digest(_parts(state))


def _parts(state: State) -> Iterator[Any]:
    """Everything that a file's content depends on: values, which of them are one tensor, and the layers."""
    first: dict[Any, str] = {}
    for name, value in state.tensors.items():
        same = first.setdefault(identity(name, value), name)
        yield name, same, str(value.device)
        if same == name:
            yield value
    for path, layer in state.layers.items():
        yield path, layer_header(layer)
        yield layer.codes
    yield state.frozen, state.attributes, state.marks
