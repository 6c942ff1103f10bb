"""Whether an operator on a tensor runs here and now, so that other code may compute the same in its place.

This is asked before each layer, whose data drives the code out of the caches: few functions are called, and none twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["runs_directly"]

_TENSORS = (Tensor, Parameter)
_C: Any = torch._C
_jit: Any = torch.jit
_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
"""Older versions do not tell torch.export from compilation."""
_any_autocast = getattr(_C, "_is_any_autocast_enabled", lambda: True)
"""Quicker than asking for a device by name."""


def runs_directly(x: Tensor) -> bool:
    """Whether an operator on x, of any shape, runs here and now on a CPU: not traced, not intercepted, no autocast.

    Calls are intercepted by a dispatch mode, a transform of torch.func, or derivatives forward. The compiler intercepts
    them, too, but it knows our operators, so it may be at work.
    """
    if type(x) not in _TENSORS or not x.is_cpu:
        return False
    if torch.compiler.is_compiling():  # true while a model is exported, too
        return not (_exporting() or _jit.is_tracing() or torch.is_autocast_enabled("cpu"))
    return not (
        _C._is_tracing()
        or (_any_autocast() and torch.is_autocast_enabled("cpu"))
        or _C._len_torch_dispatch_stack()
        or forward_ad._current_level >= 0
        or _C._functorch.peek_interpreter_stack() is not None
    )
