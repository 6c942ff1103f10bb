"""Finetuning of the whole network after the last layer is quantized."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bgd_plugin.calibration import Batch, logits_of
from bgd_plugin.config import FinetuningConfig
from bgd_plugin.errors import CalibrationError
from bgd_plugin.nn import PQModule
from bgd_plugin.support.processes import largest, parallel, processes, sum_, total
from bgd_plugin.support.steps import Part, Steps
from bgd_plugin.training.adam import relative_adam
from bgd_plugin.training.loss import codebooks, kl_to_teacher, mean_gradients_
from bgd_plugin.training.mixing import mixed
from bgd_plugin.training.outputs import outputs_to_teacher
from bgd_plugin.training.own import own_parameters_
from bgd_plugin.training.recoding import Recoding
from bgd_plugin.training.selection import trained_

__all__ = ["Epochs", "Finetuned", "finetune_", "total_steps"]

_DEFAULT_EPOCHS = 9


def total_steps(config: FinetuningConfig, batches_per_epoch: int) -> int:
    """Number of gradient steps of a finetuning run, with this number of `batches_per_epoch`."""
    return config.steps or (config.epochs or _DEFAULT_EPOCHS) * batches_per_epoch


class Epochs:
    """An endless stream of batches, epoch after epoch, that can be saved and resumed.

    Args:
        epoch: returns the batches of an epoch, given its number from 0.
        can_skip: whether an epoch's batches depend only on its number. Otherwise a resumed run iterates over the
            earlier epochs again, because their random draws or counters determine the next epoch.
    """

    def __init__(self, epoch: Callable[[int], Iterable[Batch]], *, can_skip: bool = False) -> None:
        self._epoch = epoch
        self._can_skip = can_skip
        self._number, self._taken = 0, 0
        self._batches: Iterator[Batch] | None = None

    def __next__(self) -> Batch:
        """The next batch.

        Raises:
            CalibrationError: an epoch is empty.
        """
        if self._batches is None:
            self._batches = iter(self._epoch(self._number))
        batch = next(self._batches, None)
        if batch is None and self._taken:
            self._number, self._taken = self._number + 1, 0
            self._batches = iter(self._epoch(self._number))
            batch = next(self._batches, None)
        if batch is None:
            raise CalibrationError(
                "the calibration data is empty on its second iteration: give a DataLoader or a list of batches"
            )
        self._taken += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position: epoch and batch."""
        return {"number": self._number, "taken": self._taken}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """Go to the position of a saved state: the epochs and batches before it are drawn again."""
        number, taken = state["number"], state["taken"]
        for earlier in range(0 if not self._can_skip else number, number):
            collections.deque(self._epoch(earlier), maxlen=0)
        self._number, self._taken = number, 0
        self._batches = None
        for _ in range(taken):
            next(self)


@dataclass(frozen=True, kw_only=True)
class Finetuned:
    """Result of finetuning.

    Attributes:
        first, last: the mean loss over the first and over the last tenth of the steps.
        changed: codes that were chosen again and kept; one may count several times.
        undone: how often the codes that were chosen again raised the loss.
    """

    first: float
    last: float
    changed: int = 0
    undone: int = 0

    @classmethod
    def of(cls, losses: Sequence[float], recoding: Recoding | None) -> Finetuned:
        """From the steps of a run.

        Args:
            losses: of each step.
            recoding: what chose codes again; None: nothing did.
        """
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        counts = {"changed": recoding.changed, "undone": recoding.undone} if recoding else {}
        return cls(first=first, last=last, **counts)

    def __str__(self) -> str:
        losses = f"loss {self.first:.4g} → {self.last:.4g}"
        if not self.changed and not self.undone:
            return losses
        return f"{losses}; {self.changed} codes changed, changes undone {self.undone} times because the loss rose"


def finetune_(
    student: nn.Module,
    teacher: nn.Module,
    data: Epochs,
    batches_per_epoch: int,
    config: FinetuningConfig,
    steps: Steps | None = None,
    *,
    fixed: Collection[str] = (),
) -> Finetuned:
    """Train the student to match the teacher's logits (or `outputs`); codes are fixed unless it is set otherwise.

    Args:
        student: with product-quantized modules; changed in place, left in evaluation mode. Its parameters become
            copies: other networks may share the old tensors.
        teacher: in evaluation mode.
        data: the calibration data, iterated over repeatedly.
        batches_per_epoch: number of batches in one pass over the data.
        config: the settings.
        steps: saves and reports progress.
        fixed: names of parameters that are not trained.

    Returns:
        the loss at the start and at the end, and what became of the codes.

    Raises:
        CalibrationError: the loss is not finite.
        ConfigError: a glob of `layers` matches nothing that can be trained.

    **Source**: arXiv 1907.05686, section 3.3, "global finetuning", for `trained="codebooks"`.
    """
    count = largest(total_steps(config, batches_per_epoch))
    own_parameters_(student)
    layers = codebooks(student.modules())
    is_papers = config.trained == "codebooks"
    student.eval()
    if is_papers:
        optimizer, schedule = _papers_optimizer(layers, config, count)
        _batchnorms_train(student)
    else:
        optimizer, schedule = relative_adam(trained_(student, fixed, config.layers), config.rate, count)
    zeros = [] if is_papers else _zeros(student, layers)
    recoding = Recoding(student, config) if config.recode_every else None
    losses: list[float] = []
    learner = parallel(student)
    parts: dict[str, Part] = {"student": student, "optimizer": optimizer, "schedule": schedule}
    parts |= {"recoding": recoding} if recoding else {}
    try:
        with recoding.watching() if recoding else nullcontext():
            for step in (steps or Steps()).run(count, **parts, data=data, losses=losses):
                batch = mixed(next(data), step) if config.mixing else next(data)
                optimizer.zero_grad(set_to_none=True)
                losses.append(_descend(learner, teacher, batch, config))
                if is_papers:
                    mean_gradients_(layers)
                _keep_zeros_(zeros)
                optimizer.step()
                if recoding:
                    loss = functools.partial(_loss_of_all, student, teacher, batch, config)
                    recoding.step(_share_of_rate(schedule), loss)
                schedule.step()
    finally:
        student.eval()
    if is_papers:
        _share_batchnorms_(student)
    return Finetuned.of(losses, recoding)


def _descend(student: nn.Module, teacher: nn.Module, batch: Batch, config: FinetuningConfig) -> float:
    """The loss of a batch, whose gradients are added to those of the parameters."""
    loss = _loss(student, teacher, batch, config)
    if not loss.item() < float("inf"):
        raise CalibrationError(f"finetuning: the loss is {loss.item()}; lower learning_rate={config.rate}")
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


@torch.no_grad()
def _loss_of_all(student: nn.Module, teacher: nn.Module, batch: Batch, config: FinetuningConfig) -> float:
    """The mean loss of the processes' batches."""
    return total(_loss(student, teacher, batch, config).item()) / processes()


def _zeros(student: nn.Module, layers: list[PQModule]) -> list[tuple[nn.Parameter, Tensor]]:
    """Masks of the zeros in weights that stay float, so that pruned weights stay zero; codebooks are left out."""
    learnt = {id(layer.codebook) for layer in layers}
    weights = [p for p in student.parameters() if p.ndim > 1 and id(p) not in learnt]
    return [(p, p.detach() == 0) for p in weights]


def _keep_zeros_(zeros: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, is_zero in zeros:
        if parameter.grad is not None:
            parameter.grad.masked_fill_(is_zero, 0.0)


def _share_of_rate(schedule: LRScheduler) -> float:
    """The learning rate of the step that was just taken, as a share of the first one's."""
    return float(schedule.get_last_lr()[0]) / float(schedule.base_lrs[0])


def _papers_optimizer(
    layers: list[PQModule], config: FinetuningConfig, total: int
) -> tuple[torch.optim.Optimizer, LRScheduler]:
    parameters = [layer.codebook.requires_grad_(True) for layer in layers]
    optimizer = torch.optim.SGD(parameters, lr=config.rate, momentum=config.momentum, weight_decay=config.weight_decay)
    thirds = [total // 3, 2 * total // 3] if total >= 3 else []
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=thirds, gamma=0.1)


def _loss(student: nn.Module, teacher: nn.Module, batch: Batch, config: FinetuningConfig) -> Tensor:
    if config.outputs:
        return outputs_to_teacher(student, teacher, batch, config.outputs)
    with torch.no_grad():
        target = logits_of(batch.call(teacher))
    return kl_to_teacher(logits_of(batch.call(student)), target, batch.tokens(target))


@torch.no_grad()
def _share_batchnorms_(student: nn.Module) -> None:
    """Average batch-norm statistics over the processes, each of which saw its own part of the data."""
    if processes() > 1:
        norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
        sum_(statistics)
        for tensor in statistics:
            tensor /= processes()


def _batchnorms_train(student: nn.Module) -> None:
    """Put batch norms in training mode: they normalize by the batch and update their statistics."""
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
