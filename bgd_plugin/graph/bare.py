"""Layers whose weight is a parameter that code reads by name: attention, recurrent networks, mixtures of experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bgd_plugin.graph.layer import FoundLayer, LeftLayer
from bgd_plugin.pq.layout import AS_IT_IS, Layout

__all__ = ["bare_layers", "bias_of", "multiplies_by_columns"]

_ATTENTION = {"in_proj_weight": "in_proj_bias", "q_proj_weight": "", "k_proj_weight": "", "v_proj_weight": ""}
_PROBE_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class _Role:
    """The role of a parameter: kind and family of its layer, the name of its bias; the rest as in `FoundLayer`."""

    kind: str = "linear"
    family: str = "linear"
    bias: str = ""
    layout: Layout = AS_IT_IS
    members: int = 1


def bare_layers(
    module: nn.Module, name: str, calls: tuple[str, ...], seen: set[int]
) -> Iterator[FoundLayer | LeftLayer]:
    """The layers whose weights are parameters of a module that cannot itself be replaced.

    Args:
        module: the module.
        name: its path.
        calls: names of the nodes that run it.
        seen: ids of the parameters already found; new ones are added.
    """
    others, has_found = [], False
    for attribute, parameter in module._parameters.items():
        if parameter is None or parameter.ndim < 2 or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        role = _role(module, attribute, parameter) if parameter.is_floating_point() else None
        if role is None:
            others.append(attribute)
            continue
        path, has_found = f"{name}.{attribute}" if name else attribute, True
        yield FoundLayer(
            name=name if attribute == "weight" and name else path,
            target=path,
            kind=role.kind,
            family=role.family,
            weight=parameter,
            calls=calls,
            functional=True,
            hidden=True,
            bias=bias_of(module, name, role.bias),
            layout=role.layout,
            members=role.members,
        )
    if others:
        paths = [f"{name}.{other}".lstrip(".") for other in others]
        label = ", ".join(paths) if has_found or not name else name
        yield LeftLayer(name=label, reason=f"{type(module).__name__} has no product-quantized form")


def bias_of(module: nn.Module, path: str, name: str = "bias") -> str | None:
    """The path of a module's bias, if it has a parameter of this name."""
    return None if module._parameters.get(name) is None else f"{path}.{name}".lstrip(".")


def _role(module: nn.Module, attribute: str, parameter: Tensor) -> _Role | None:
    if isinstance(module, nn.MultiheadAttention):
        return _Role(bias=_ATTENTION[attribute]) if attribute in _ATTENTION else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return _Role(bias=attribute.replace("weight", "bias")) if attribute.startswith("weight") else None
    if multiplies_by_columns(module):
        return _Role(bias="bias", layout=Layout(transposed=True))
    if parameter.ndim == 3 and len(parameter) > 1 and len(parameter) == _experts(module):
        transposed = _is_transposed(module, parameter)
        columns = parameter.shape[1] if transposed else parameter.shape[2]
        return _Role(layout=Layout(transposed=transposed, columns=columns), members=len(parameter))
    return _mixed_convolution(module, attribute, parameter)


def _experts(module: nn.Module) -> int:
    """The number of experts, by the module's own attributes."""
    names = [name for name in vars(module) if name.endswith("num_experts") or name == "num_local_experts"]
    return next((vars(module)[name] for name in names if isinstance(vars(module)[name], int)), 0)


def _is_transposed(module: nn.Module, parameter: Tensor) -> bool:
    """Whether experts' weights are `[experts, in, out]`: by the module's attribute, or by the shapes that match."""
    said = getattr(module, "is_transposed", None)
    if isinstance(said, bool):
        return said
    others = [p for p in module._parameters.values() if p is not None and p.ndim == 3 and p is not parameter]
    forward = any(o.shape[1] == parameter.shape[2] or o.shape[2] in _halves(parameter.shape[1]) for o in others)
    backward = any(o.shape[2] == parameter.shape[1] or o.shape[1] in _halves(parameter.shape[2]) for o in others)
    return backward and not forward


def _halves(size: int) -> tuple[int, int]:
    """A size, and half of it, for weights that hold a gate and a value side by side."""
    return size, size // 2


def _mixed_convolution(module: Any, attribute: str, parameter: Tensor) -> _Role | None:
    """A convolution whose kernel is a mix of several, one in each row; the inputs of each are unknown."""
    kernel = getattr(module, "kernel_size", None)
    if attribute != "weight" or parameter.ndim != 2 or len(parameter) != _experts(module):
        return None
    if not isinstance(kernel, tuple) or not hasattr(module, "in_channels"):
        return None
    columns = module.in_channels // getattr(module, "groups", 1)
    for size in kernel:
        columns *= size
    is_conv = parameter.shape[1] == module.out_channels * columns
    family = "conv" if columns > module.in_channels else "pointwise_conv"
    return _Role(kind="embedding", family=family, layout=Layout(columns=columns)) if is_conv else None


def multiplies_by_columns(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight is `[in, out]`, as transformers' `Conv1D`, found by a trial run.

    The trial uses random weights instead of the module's own, and no hooks.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.ndim != 2 or any(True for _ in module.children()) or "forward" in vars(module):
        return False
    if {name for name, p in module._parameters.items() if p is not None} - {"weight", "bias"} or module._buffers:
        return False
    if bias is not None and bias.shape != weight.shape[1:]:
        return False
    return _multiplies(module, (weight.shape[0], weight.shape[1]), has_bias=bias is not None)


@torch.no_grad()
def _multiplies(module: nn.Module, shape: tuple[int, int], *, has_bias: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows, columns = shape
    x = torch.randn(_PROBE_ROWS, rows, generator=generator, device="cpu")
    weight = torch.randn(rows, 1, generator=generator, device="cpu").expand(rows, columns) / max(1, rows) ** 0.5
    weight = weight * torch.randn(columns, generator=generator, device="cpu")
    state = {"weight": weight}
    if has_bias:
        state["bias"] = torch.randn(columns, generator=generator, device="cpu")
    plain: Any = type(module).__new__(type(module))
    vars(plain).update({k: v.copy() if isinstance(v, dict) else v for k, v in vars(module).items()})
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        vars(plain)[hooks] = {}
    try:
        answer = functional_call(plain, state, (x,))
    except Exception:  # the module's own code, on an input that it may not accept
        return False
    expected = x @ weight + state.get("bias", torch.zeros((), device="cpu"))
    return isinstance(answer, Tensor) and answer.shape == expected.shape and torch.allclose(answer, expected, atol=1e-4)
