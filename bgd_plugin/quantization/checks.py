"""Checks that `quantize` makes before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bgd_plugin.calibration import require_rewalkable
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.support.digest import digest
from bgd_plugin.support.processes import from_all, largest, processes

__all__ = ["check_arguments", "require_same_layers"]


def check_arguments(model: nn.Module, calibration: Iterable[Any], config: BGDConfig, memory_bytes: int | None) -> None:
    """Reject a network, calibration data or a memory bound (`memory_bytes`) that no run can work with.

    Raises:
        ConfigError: weights on the meta device or not finite; processes that differ; a memory bound below one byte.
        CalibrationError: an iterator, where the data is needed more than once.
    """
    _require_values(model)
    _require_one_job(model, config)
    if memory_bytes is not None and memory_bytes < 1:
        raise ConfigError(f"memory_bytes={memory_bytes}: give a positive number of bytes, or None for no bound")
    if config.finetuning:
        require_rewalkable(calibration, "finetuning")


def require_same_layers(reached: Sequence[str]) -> None:
    """Of several processes, all must come to the same layers and norms on their parts of the data, in the same order.

    Args:
        reached: names, in the order in which a network that does not trace comes to them.

    Raises:
        ConfigError: naming what some processes come to and others do not.
    """
    if processes() == 1:
        return
    orders = [json.loads(content) for content in from_all(json.dumps(list(reached)).encode())]
    if all(order == orders[0] for order in orders):
        return
    everywhere = set(orders[0]).intersection(*orders)
    partly = sorted(set().union(*orders) - everywhere)
    what = f"only some processes run {', '.join(partly[:8])}" if partly else "the order of layers differs"
    raise ConfigError(
        f"the network does not trace, and runs different layers on each process's part of the data: {what}. Use one "
        "process, or give every process data that reaches all layers"
    )


def _require_values(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"{name!r} is on the meta device and has no values: such a network can be planned, but not quantized"
            )
        is_learnt = isinstance(tensor, nn.Parameter) or name.endswith(("running_mean", "running_var"))
        if is_learnt and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(f"{name!r} of the network contains NaN or infinite values: repair the network first")


def _require_one_job(model: nn.Module, config: BGDConfig) -> None:
    """Check that all processes have the same network and settings.

    Raises:
        ConfigError: they differ.
    """
    if processes() > 1:
        content = digest([*model.state_dict().values(), config.to_json()])
        number = int(content[:12], 16)
        if -largest(-number) != largest(number):
            raise ConfigError(
                "the processes of this job have different networks or settings: load the same weights in each (with "
                "the same seed if they are random); only the calibration data may differ"
            )
