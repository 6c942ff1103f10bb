"""Which names of a state are one tensor, and how many bytes a state has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["identity", "state_bytes"]


def identity(name: str, value: Tensor) -> tuple[Any, ...]:
    """A key of a tensor of any shape, equal for two names (`name`) of the same tensor (`value`)."""
    if value.numel() == 0 or value.is_meta:
        return (id(value.untyped_storage()._cdata), name) if value.numel() == 0 else (value.untyped_storage()._cdata,)
    return (value.data_ptr(), value.dtype, value.shape, value.stride(), value.device)


def state_bytes(state: Mapping[str, Any]) -> int:
    """Bytes of all parameters and buffers of a state dict, each once, views with their memory at most."""
    distinct = {identity(name, t): t for name, t in state.items() if isinstance(t, Tensor)}
    shared: dict[int, list[Tensor]] = {}
    for tensor in distinct.values():
        shared.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    return sum(
        min(sum(t.numel() * t.element_size() for t in tensors), tensors[0].untyped_storage().nbytes())
        for tensors in shared.values()
    )
