"""A fingerprint of tensors and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["digest"]


def digest(values: Iterable[Any]) -> str:
    """A fingerprint of tensors: dtype, shape and bytes; other values are represented by their printed form.

    Returns:
        the first 32 hexadecimal digits of a SHA-256.
    """
    hashed = hashlib.sha256()
    for value in values:
        if isinstance(value, Tensor):
            hashed.update(f"{value.dtype}{list(value.shape)}".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            hashed.update(flat.view(torch.uint8).numpy().data)
        else:
            hashed.update(repr(value).encode())
    return hashed.hexdigest()[:32]
