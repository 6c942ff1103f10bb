"""The caller's modes are not ours: gradients, autocast and default device are plain during the work, then as before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["plain_modes"]

_AUTOCAST_DEVICES = ("cpu", "cuda", "xpu", "mps")


@contextmanager
def plain_modes(device: torch.device | None = None) -> Iterator[None]:
    """Gradients as outside of `no_grad` and `inference_mode`, no autocast, and a given default device.

    A network that is run inside keeps its own contexts, those that its `forward` enters, and the caller's default
    dtype, in which it may make tensors.

    Args:
        device: where the network is; None: the CPU.
    """
    device = device or torch.device("cpu")
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != device.type:
            stack.enter_context(device)
        yield
