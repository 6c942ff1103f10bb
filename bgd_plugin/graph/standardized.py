"""Weights that a layer's `forward` computes from its parameters, such as NFNet's and BiT's standardized convolutions.

The layer then multiplies by another weight than the one it holds. If that weight is the same at each call, and
`forward` does nothing else, an ordinary layer with that weight replaces it.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bgd_plugin.graph.kinds import kind_of, runs_its_parents_forward
from bgd_plugin.nn import SamePadding, take_hooks_

__all__ = ["fold_computed_weights_"]

_FUNCTIONS = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d, "linear": F.linear}
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIZES = (9, 12)  # input sizes of the trial runs, beyond the kernel's
_TOLERANCE = 1e-5


def fold_computed_weights_(model: nn.Module) -> dict[str, str]:
    """Replace layers that compute their weight by ordinary ones, in place.

    They are found by trial runs with random inputs, on copies without hooks. The network itself is not replaced.

    Returns:
        by layer, the class that computed its weight.
    """
    folded: dict[str, str] = {}
    plain: dict[int, nn.Module] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if not path or kind_of(module) not in _FUNCTIONS or runs_its_parents_forward(module):
            continue
        if id(module) not in plain:
            found = _plain_layer(module, _FUNCTIONS[str(kind_of(module))])
            if found is None:
                continue
            plain[id(module)] = found
        owner, _, name = path.rpartition(".")
        model.get_submodule(owner)._modules[name] = plain[id(module)]
        folded[path] = type(module).__name__
    return folded


@dataclass
class _Calls(TorchFunctionMode):
    """The calls of one function: arguments by name, and results."""

    function: Any
    seen: list[tuple[dict[str, Any], Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is self.function:
            self.seen.append((dict(zip(_ARGUMENTS, args, strict=False)) | (kwargs or {}), result))
        return result


@torch.no_grad()
def _plain_layer(module: Any, function: Any) -> nn.Module | None:
    """The ordinary layer equal to a module; None if there is none, or the module does not compute its weight."""
    held = module._parameters.get("weight")
    if held is None or not held.is_floating_point():
        return None
    try:
        calls = [_call(module, function, x) for x in _inputs(module, held)]
    except Exception:  # the module's own code, on inputs that it may not accept
        return None
    if any(call is None for call in calls):
        return None
    (first, _), (second, _) = calls  # type: ignore[misc]
    weight = first["weight"]
    is_computed = weight.shape == held.shape and weight.data_ptr() != held.data_ptr()
    if not is_computed or (not weight.is_meta and not torch.equal(weight, second["weight"])):
        return None
    return _layer(module, first, weight)


def _inputs(module: Any, weight: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    columns = weight.shape[1] * getattr(module, "groups", 1)
    steps = getattr(module, "dilation", ())
    kernel = [(size - 1) * step + 1 for size, step in zip(weight.shape[2:], steps, strict=False)]
    shapes = [(3, columns, *(size + extra for size in kernel)) for extra in _SIZES]
    return [torch.randn(s, generator=generator, device="cpu", dtype=torch.float32).to(weight) for s in shapes]


def _call(module: Any, function: Any, x: Tensor) -> tuple[dict[str, Any], Tensor] | None:
    """The module's only call of the function, if it is on the input itself and returns the output; otherwise None."""
    bare = module.__class__.__new__(module.__class__)
    vars(bare).update({k: OrderedDict() if k.endswith("_hooks") else copy.copy(v) for k, v in vars(module).items()})
    bare._buffers = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    bare._modules = copy.deepcopy(module._modules)
    calls = _Calls(function)
    with calls:
        answer = bare.eval()(x)
    if len(calls.seen) != 1:
        return None
    arguments, result = calls.seen[0]
    given = arguments["input"]
    if given is not x and given.shape != x.shape:
        arguments = arguments | {"same": True}
        x = _same_padding(module, arguments).padded(x)
    is_whole = given is arguments["input"] and answer is result and (given is x or torch.equal(given, x))
    return (arguments, result) if is_whole else None


def _same_padding(module: Any, arguments: dict[str, Any]) -> SamePadding:
    """Padding that depends on the input's size, as some networks have taken it over from TensorFlow."""
    ones = (1,) * len(module.kernel_size)
    stride, dilation = (_each(arguments.get(name, 1), ones) for name in ("stride", "dilation"))
    return SamePadding(tuple(module.kernel_size), stride, dilation)


def _each(value: Any, ones: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else tuple(value * one for one in ones)


def _layer(module: Any, arguments: dict[str, Any], weight: Tensor) -> nn.Module:
    """The layer with a call's arguments, and the hooks, mode and flags of the module that it replaces."""
    bias = arguments.get("bias")
    if isinstance(module, nn.Linear):
        result: Any = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    else:
        base: Any = next(kind for kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, kind))
        geometry = {name: arguments[name] for name in ("stride", "padding", "dilation") if name in arguments}
        groups = arguments.get("groups", 1)
        result = base(
            weight.shape[1] * groups,
            weight.shape[0],
            tuple(weight.shape[2:]),
            groups=groups,
            bias=bias is not None,
            device="meta",
            **geometry,
        )
    result.weight = nn.Parameter(weight.detach().clone(), module.weight.requires_grad)
    if bias is not None:
        is_parameter = bias is module._parameters.get("bias")
        result.bias = module.bias if is_parameter else nn.Parameter(bias.detach().clone(), module.weight.requires_grad)
    take_hooks_(result, module)
    if arguments.get("same"):
        result.register_forward_pre_hook(_same_padding(module, arguments))
    trained: nn.Module = result.train(module.training)
    return trained
