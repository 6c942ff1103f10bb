"""Example inputs: the network is traced with them, and its exported file is checked with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.errors import BGDError, ConfigError

__all__ = ["Examples", "tensors_in"]


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Arguments of one call of the network, on the CPU.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, inputs: Any) -> Examples:
        """From inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.

        Raises:
            ConfigError: they contain no tensor.
        """
        if not tensors_in(inputs):
            raise ConfigError(
                "example_inputs contains no tensor: give a tensor, a tuple of positional arguments, or a mapping of "
                "keyword arguments"
            )
        moved = pytree.tree_map(lambda x: x.detach().cpu() if isinstance(x, Tensor) else x, inputs)
        if isinstance(moved, Mapping):
            return cls(args=(), kwargs=dict(moved))
        if isinstance(moved, Tensor):
            return cls(args=(moved,), kwargs={})
        return cls(args=tuple(moved) if isinstance(moved, Sequence) else (moved,), kwargs={})

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors, of any shapes, in the order of the exported network's inputs."""
        return tensors_in((self.args, self.kwargs))

    def batched(self, times: int) -> Examples:
        """The same with a batch `times` as large: each tensor is repeated along its first dimension.

        Raises:
            ConfigError: the tensors' first dimensions differ, so they are not a batch.
        """
        sizes = {tuple(tensor.shape[:1]) for tensor in self.tensors}
        if len(sizes) != 1 or sizes == {()}:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in self.tensors)
            raise ConfigError(
                f"dynamic=True: the first dimensions of the example inputs differ ({shapes}), so they are not a batch; "
                "give torch.export's dynamic_shapes as `dynamic` instead"
            )

        def repeated(value: Any) -> Any:
            return torch.cat([value] * times) if isinstance(value, Tensor) else value

        args, kwargs = pytree.tree_map(repeated, (self.args, self.kwargs))
        return Examples(args=args, kwargs=kwargs)

    def dynamic_shapes(self) -> Any:
        """For torch.export: the first dimension of each tensor is free."""
        batch = torch.export.Dim.DYNAMIC

        def shape(value: Any) -> Any:
            return {0: batch} if isinstance(value, Tensor) else None

        args, kwargs = pytree.tree_map(shape, (self.args, self.kwargs))
        return args or kwargs

    @torch.no_grad()
    def answers(self, model: nn.Module) -> tuple[Tensor, ...]:
        """The tensors, of any shapes, that the network returns for these inputs.

        Raises:
            BGDError: the network fails on them, or returns no tensor.
        """
        try:
            outputs = tensors_in(model(*self.args, **self.kwargs))
        except Exception as error:  # the user's own forward, which may raise anything
            raise BGDError(
                f"the network fails on the example inputs ({type(error).__name__}: {error}): give the arguments that "
                "its forward takes"
            ) from error
        if not outputs:
            raise BGDError("the network returns no tensor for the example inputs, so there is nothing to export")
        return outputs


def tensors_in(value: Any) -> tuple[Tensor, ...]:
    """All tensors, of any shapes, in a value of nested containers, in order."""
    return tuple(leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor))
