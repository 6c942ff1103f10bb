"""Distillation on the outputs of inner modules, for networks that do not return logits."""

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
    """Mean over tensors of ‖student − teacher‖² / ‖teacher‖², for the outputs of the named modules on one batch.

    The student repeats the teacher's decisions (`calibration.replay`), so a detector's second stage sees the same
    regions in both networks, and its outputs can be compared element by element.

    Args:
        student: the network being trained.
        teacher: the network whose outputs are matched.
        batch: the input of both.
        patterns: globs of module names.

    Returns:
        a scalar.

    Raises:
        ConfigError: a glob matches no module, or the modules return no floating-point tensors.
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
        raise ConfigError(f"outputs {', '.join(patterns)}: these modules return no floating-point tensors")
    return torch.stack(losses).mean()


def _deciding(decisions: Recorder | Replayer) -> Watch:
    return Watch({}, lambda *_: None, decisions)


@contextlib.contextmanager
def _given(network: nn.Module, patterns: Sequence[str]) -> Iterator[list[Tensor]]:
    """The outputs of modules while the network runs, in order."""
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
