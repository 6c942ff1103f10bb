"""Random numbers: a generator of its own for each purpose, the same whichever other work was done before."""

from __future__ import annotations

import zlib

import torch

__all__ = ["seeded"]


def seeded(seed: int, *purpose: object) -> torch.Generator:
    """A generator whose numbers depend on a seed and a purpose alone.

    Args:
        seed: as `BGDConfig.seed`.
        purpose: what the numbers are for, such as a layer's name; told apart by how it prints.
    """
    return torch.Generator().manual_seed(zlib.crc32(" ".join(map(str, (seed, *purpose))).encode()))
