"""Tensors of its own for a network that is trained: copies of a network share theirs, and training writes to them."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["own_parameters_"]


@torch.no_grad()
def own_parameters_(network: nn.Module) -> None:
    """Replace every parameter by a copy; modules that shared one share the copy.

    Args:
        network: changed in place; networks that shared its parameters keep the old ones.
    """
    copies: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in copies:
                    copies[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                setattr(module, name, copies[id(parameter)])  # a recurrent layer also lists its parameters
