"""Copies of networks that share nothing a call could change; functions that close over a module are copied, too."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.overrides import TorchFunctionMode

from bgd_plugin.errors import ConfigError
from bgd_plugin.graph.references import Memo, rebind_

__all__ = ["copy_module", "drop_hooks_", "functions_of", "require_initialized", "set_modes"]


def copy_module(model: nn.Module, *, share_tensors: bool = False) -> Any:
    """A copy that can be changed, and run, without touching `model`.

    More than `copy.deepcopy`: tensors with a history are copied without it; functions among the attributes and hooks
    that close over a module of the network close over the copy's; a `GraphModule` keeps its attributes and hooks.

    Args:
        model: the network; never changed.
        share_tensors: share the parameters, so that the copy costs no memory; never write to them. Buffers are copied
            anyway, because running a network may write to them.

    Returns:
        the copy, of the class of `model`.

    Raises:
        ConfigError: an attribute that cannot be copied, such as a lock or an open file, or a lazy layer that has never
            run; it is named.
    """
    require_initialized(model)
    memo: Memo = {id(p): p for p in model.parameters()} if share_tensors else {}
    memo |= _without_history(model)
    try:
        with torch.no_grad(), _HistoryDropped():
            result = copy.deepcopy(model, memo)
    except ConfigError:
        raise
    except Exception as error:  # copying runs the code of whatever the network holds
        raise ConfigError(_why_not(model, error)) from error
    for theirs in model.modules():
        mine = memo.get(id(theirs))
        if mine is None:  # inside a scripted module, whose copy torch makes
            continue
        if isinstance(theirs, fx.GraphModule):
            _give_attributes_(mine, theirs, memo)
        rebind_(mine, memo)
    return result


def drop_hooks_(model: nn.Module) -> None:
    """Remove every forward and backward hook of a network, in place."""
    for module in model.modules():
        for table in vars(module):
            if table.startswith(("_forward_", "_backward_")) and "hooks" in table:
                vars(module)[table] = OrderedDict()


def set_modes(model: nn.Module, modes: Mapping[str, bool]) -> None:
    """Set the training mode of each module.

    Args:
        model: the network; changed in place.
        modes: `training` by path; must have the root, "", which the paths not listed follow.
    """
    for path, module in model.named_modules():
        module.training = modes.get(path, modes[""])


def require_initialized(model: nn.Module) -> None:
    """Refuse lazy layers that have no weights yet.

    Raises:
        ConfigError: there are some; they are named.
    """
    lazy = [
        f"{path or 'the network'!r} ({type(module).__name__})"
        for path, module in model.named_modules()
        if any(
            isinstance(t, (UninitializedBuffer, UninitializedParameter))
            for t in (*module._parameters.values(), *module._buffers.values())
        )
    ]
    if lazy:
        raise ConfigError(
            f"lazy layers without weights: {', '.join(dict.fromkeys(lazy))}; run the network once on a batch first"
        )


def _without_history(model: nn.Module) -> Memo:
    """A memo for a copy: attributes that a hook computes at each call (pruning masks, norms), detached."""
    attributes = (value for module in model.modules() for value in vars(module).values())
    return {id(t): t.detach() for t in attributes if isinstance(t, Tensor) and t.grad_fn is not None}


class _HistoryDropped(TorchFunctionMode):
    """Copies the values of a tensor that has a gradient history; `deepcopy` alone would refuse it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and args[0].grad_fn is not None:
            tensor, memo = args
            memo[id(tensor)] = values = tensor.detach().clone()
            return values
        return func(*args, **(kwargs or {}))


def _why_not(model: nn.Module, error: Exception) -> str:
    """Which attribute cannot be copied."""
    known = {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                with _HistoryDropped():
                    copy.deepcopy(value, dict(known))
            except Exception as cause:  # as above
                where = f"{path}.{name}".lstrip(".")
                return (
                    f"attribute {where!r} of the network, a {_kind(value)}, cannot be copied ({cause}), but the "
                    "library works on a copy: remove it first (keep locks, open files and the like elsewhere)"
                )
    return f"the network cannot be copied ({type(error).__name__}: {error}), but the library works on a copy"


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def _give_attributes_(mine: nn.Module, theirs: nn.Module, memo: Memo) -> None:
    """Give the copy of a `GraphModule` what copying drops: the user's attributes, and hooks."""
    hooks = {name for name in vars(theirs) if name.endswith("_hooks") or "_hooks_" in name}
    for name, value in vars(theirs).items():
        if name not in vars(mine) or (name in hooks and not vars(mine)[name] and value):
            vars(mine)[name] = copy.deepcopy(value, memo)
    mine._non_persistent_buffers_set = set(theirs._non_persistent_buffers_set)


def functions_of(module: nn.Module) -> list[Any]:
    """The functions that a module holds: among its attributes, and in its tables of hooks."""
    values: list[Any] = []
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules"):
            values += value.values() if isinstance(value, dict) else [value]
    return [value for value in values if callable(value) and not isinstance(value, (nn.Module, type))]
