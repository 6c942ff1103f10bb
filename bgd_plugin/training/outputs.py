"""Distillation on what modules inside a network give, for networks whose answer has no logits."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, Recorder, Replayer, Watch
from bgd_plugin.errors import ConfigError

__all__ = ["outputs_to_teacher"]

_TINY = 1e-12


def outputs_to_teacher(student: nn.Module, teacher: nn.Module, batch: Batch, patterns: Sequence[str]) -> Tensor:
    """Mean over tensors of ‖student − teacher‖² / ‖teacher‖², on what the named modules give for one batch.

    The student follows the teacher's decisions (`calibration.decisions`): a detector's second stage then looks at the
    same regions in both, and its outputs can be compared one by one.

    Raises:
        ConfigError: a glob that matches no module, or modules that give nothing that can be compared.
    """
    recorder = Recorder()
    with torch.no_grad(), _given(teacher, patterns) as wanted, _deciding(recorder):
        batch.call(teacher)
    with _given(student, patterns) as found, _deciding(Replayer(recorder.decisions)):
        batch.call(student)
    losses = [
        (mine - theirs).square().sum() / (theirs.square().sum() + _TINY)
        for mine, theirs in zip(found, wanted, strict=False)
        if mine.shape == theirs.shape and theirs.numel()
    ]
    if not losses:
        raise ConfigError(f"outputs {', '.join(patterns)}: these modules give no numbers that could be compared")
    return torch.stack(losses).mean()


def _deciding(decisions: Recorder | Replayer) -> Watch:
    return Watch({}, lambda *_: None, decisions)


@contextlib.contextmanager
def _given(network: nn.Module, patterns: Sequence[str]) -> Iterator[list[Tensor]]:
    """What modules give while the network runs, in order."""
    given: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        given.extend(t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point())

    names = [name for name, _ in network.named_modules()]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(f"outputs: {pattern!r} matches no module of the network")
    with contextlib.ExitStack() as hooks:
        for name, module in network.named_modules():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                hooks.callback(module.register_forward_hook(keep).remove)
        yield given
