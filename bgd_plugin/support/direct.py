"""Whether an operator on a tensor runs here and now, so that other code may compute the same in its place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["runs_directly"]

_TENSORS = (Tensor, Parameter)


def runs_directly(x: Tensor) -> bool:
    """Whether an operator on x, of any shape, runs here and now on a CPU: not traced, not intercepted, no autocast.

    The compiler may be at work: it knows our operators.
    """
    is_plain = type(x) in _TENSORS and x.is_cpu and not _is_traced()
    return is_plain and not torch.is_autocast_enabled("cpu") and not _is_intercepted()


def _is_traced() -> bool:
    """Whether torch.jit.trace or torch.export is running; older versions do not tell the latter from compilation."""
    jit: Any = torch.jit
    exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(jit.is_tracing() or exporting())


def _is_intercepted() -> bool:
    """Whether operator calls are intercepted: by a dispatch mode, a transform of torch.func, or derivatives forward.

    The compiler intercepts them, too, but it knows our operators.
    """
    return not torch.compiler.is_compiling() and bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
    )
