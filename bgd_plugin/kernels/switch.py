"""When the kernels are used: on a CPU, in inference, unless they are turned off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from bgd_plugin.jit.llvm import AVAILABLE
from bgd_plugin.jit.switch import turned_off
from bgd_plugin.support.direct import runs_directly

__all__ = ["computable", "needs_no_gradient_here", "plain_layers", "plain_path", "usable"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CODES = (torch.uint8, torch.int16, torch.int32)
_LARGEST_BLOCK = 128


_is_plain: ContextVar[bool] = ContextVar("bgd_plain_layers", default=False)


@contextmanager
def plain_layers() -> Iterator[None]:
    """Inside the `with` block this thread's layers decode their weights and call torch's own operators.

    Other compiled code runs as before, where `jit.switch.disabled` turns all of it off.
    """
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


def plain_path() -> bool:
    """Whether layers are to use torch's operators alone, by `plain_layers` or by the user's wish."""
    return _is_plain.get() or turned_off()


def usable(x: Tensor, codebook: Tensor, codes: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels may compute a layer's output now, and no gradient is needed.

    Args:
        x: the input, any shape.
        codebook, codes: of the shapes of their form (`pq.forms`).
        others: the layer's other tensors, of any shape: bias and mask.
    """
    if torch.is_grad_enabled() and _need_gradient(x, codebook, *others):
        return False
    return computable(x, codebook, codes)


def computable(x: Tensor, codebook: Tensor, codes: Tensor) -> bool:
    """Whether the kernels may compute a layer's output now; where a gradient is needed, by the operator that has one.

    They may not while a model is traced or exported (graphs hold torch's operators), if calls of operators are
    intercepted (autocast, vmap, dispatch modes, tensor subclasses), or for unsupported dtypes.

    Args:
        x, codebook, codes: of the shapes in `usable`.
    """
    if not runs_directly(x):
        return False
    dtype, shape = x.dtype, codebook.shape
    if dtype != codebook.dtype or dtype not in _DTYPES or codes.dtype not in _CODES:
        return False
    if len(shape) > 1 and shape[1] > _LARGEST_BLOCK:
        return False
    if not (codebook.is_cpu and codes.is_cpu and codes.is_contiguous() and codebook.is_contiguous()):
        return False
    return AVAILABLE and not (_is_plain.get() or turned_off())


def needs_no_gradient_here(x: Tensor, *others: Tensor | None) -> bool:
    """Whether operators run here and now on a CPU, neither traced nor compiled, and nobody will ask for a gradient.

    Args:
        x: the input, any shape.
        others: the layer's tensors, of any shape.
    """
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and _need_gradient(x, *others)):
        return False
    return runs_directly(x)


def _need_gradient(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
