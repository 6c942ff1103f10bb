"""Norms that a rotation left with a matrix behind them: where they stand, and room for them in a float network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bgd_plugin.graph import module_or_none, swap_
from bgd_plugin.nn import RotatedNorm

__all__ = ["make_rotated_", "rotated_in"]


def rotated_in(model: nn.Module) -> dict[str, int]:
    """The width of each `RotatedNorm`, by its path."""
    return {path: len(m.matrix) for path, m in model.named_modules() if isinstance(m, RotatedNorm)}


def make_rotated_(network: nn.Module, widths: Mapping[Any, Any]) -> list[str]:
    """Put an empty `RotatedNorm` around norms, in place, so that a state dict can be loaded.

    Args:
        network: with ordinary norms.
        widths: as `rotated_in` gives them; what a file says, and so of any content.

    Returns:
        what does not fit the network, in words.
    """
    problems = []
    for path, width in widths.items():
        norm = module_or_none(network, path) if isinstance(path, str) and path else None
        sizes = [] if norm is None else [tuple(p.shape) for p in norm._parameters.values() if p is not None]
        if norm is None or not sizes or any(size != (width,) for size in sizes) or norm._modules:
            problems.append(f"{path!r}: a norm of {width} features with a matrix behind it; the network has none there")
        else:
            swap_(network, path, RotatedNorm.empty(norm))
    return problems
