"""What evaluation mode never uses of a network, such as auxiliary classifiers: stored, but not counted in the ratio."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx, nn

from bgd_plugin.files.same_tensor import state_bytes
from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.support.tables import mib

__all__ = ["unused_bytes", "unused_note", "unused_parts", "unused_weights"]

_MOST_NAMED = 4


def unused_weights(original: nn.Module, network: nn.Module, folded: Mapping[str, str]) -> list[SkippedLayer]:
    """Weights of the network that its graph in evaluation mode never uses; those of folded layers are used there.

    Args:
        original: the caller's network.
        network: as it is fitted.
        folded: the paths of layers whose weight was computed.
    """
    used = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return [
        SkippedLayer(name=name, reason="not used in evaluation mode")
        for name, p in original.named_parameters()
        if p.ndim > 1 and name not in used and not _is_within(name, folded)
    ]


def unused_parts(original: nn.Module, network: nn.Module, folded: Mapping[str, str]) -> dict[str, nn.Module]:
    """By path, the largest parts with parameters that its graph never runs or reads.

    Args:
        original: the caller's network.
        network: as it is fitted.
        folded: the paths of layers whose weight was computed.
    """
    if not isinstance(network, fx.GraphModule) or isinstance(original, fx.GraphModule):
        return {}
    kept = {path for path, _ in network.named_modules(remove_duplicate=False)}
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    used = {id(p) for name, p in original.named_parameters(remove_duplicate=False) if name in names}
    parts: dict[str, nn.Module] = {}
    for path, module in original.named_modules():
        is_unused = path not in kept and not _is_within(f"{path}.", {**folded, **parts})
        if is_unused and any(id(parameter) not in used for parameter in module.parameters()):
            parts[path] = module
    return parts


def unused_bytes(original: nn.Module, parts: Mapping[str, nn.Module]) -> int:
    """How many bytes of a network only such parts hold."""
    state = original.state_dict(keep_vars=True)
    rest = {name: value for name, value in state.items() if not _is_within(name, parts)}
    return state_bytes(state) - state_bytes(rest)


def unused_note(original: nn.Module, parts: Mapping[str, nn.Module]) -> str:
    """What plan and report say of such parts; empty if there are none."""
    if not parts:
        return ""
    named, others = list(parts)[:_MOST_NAMED], len(parts) - _MOST_NAMED
    names = ", ".join(named) + (f" and {others} more" if others > 0 else "")
    return (
        f"{mib(unused_bytes(original, parts))} of the float network are never used in evaluation mode ({names}): the "
        "file holds them, and the ratio does not count them; remove these parts for a smaller file"
    )


def _is_within(name: str, paths: Mapping[str, object]) -> bool:
    return any(name.startswith(f"{path}." if path else "") for path in paths)
