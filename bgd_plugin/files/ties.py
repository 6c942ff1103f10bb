"""Parameters that have several names stay one parameter when a file is loaded."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bgd_plugin.graph import module_at

__all__ = ["tie_", "ties"]


def ties(network: nn.Module, header: dict[str, Any], tensors: dict[str, Tensor]) -> list[list[str]]:
    """Groups of names that refer to the same parameter, in the network and in the file.

    Args:
        network: given as `like`.
        header: the file's.
        tensors: the file's, of any shape, by name.
    """
    aliases: dict[str, Any] = header.get("aliases", {})
    names: dict[tuple[int, int], list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        held = tensors.get(str(aliases.get(name, name)))
        names.setdefault((id(parameter), id(held)), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def tie_(network: nn.Module, groups: list[list[str]]) -> None:
    """Tie parameters again: loading gives each name its own parameter.

    Args:
        network: changed in place.
        groups: of `ties`.
    """
    for names in groups:
        owners = [(module_at(network, name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        owner, attribute = owners[0]
        for other, name in owners[1:]:
            other._parameters[name] = owner._parameters[attribute]
