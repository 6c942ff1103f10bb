"""Finetuning of all codewords together, after the last layer is quantized."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch, logits_of
from bgd_plugin.config import FinetuningConfig
from bgd_plugin.distributed import largest, parallel, processes, sum_
from bgd_plugin.errors import CalibrationError
from bgd_plugin.training.loss import codebooks, kl_to_teacher, mean_gradients_
from bgd_plugin.training.outputs import outputs_to_teacher

__all__ = ["finetune_", "total_steps"]


_DEFAULT_EPOCHS = 9


def total_steps(config: FinetuningConfig, batches_per_epoch: int) -> int:
    """Gradient steps of a finetuning run."""
    return config.steps or (config.epochs or _DEFAULT_EPOCHS) * batches_per_epoch


def finetune_(
    student: nn.Module,
    teacher: nn.Module,
    epochs: Callable[[], Iterable[Batch]],
    batches_per_epoch: int,
    config: FinetuningConfig,
    on_step: Callable[[], None] = lambda: None,
) -> float:
    """Train all codebooks so that the student's logits (or `outputs`) come near the teacher's; batch norms update.

    Args:
        student: with product-quantized modules; changed in place, left in evaluation mode.
        teacher: in evaluation mode.
        epochs: each call walks over the calibration data once.
        on_step: called after each step.

    Returns:
        the mean loss of the last tenth of the steps.

    Raises:
        CalibrationError: the loss is not finite.

    **Source**: arXiv 1907.05686, section 3.3, "global finetuning".
    """
    layers = codebooks(student.modules())
    parameters = [layer.codebook.requires_grad_(True) for layer in layers]
    optimizer = torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    steps = largest(total_steps(config, batches_per_epoch))
    thirds = [steps // 3, 2 * steps // 3] if steps >= 3 else []
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=thirds, gamma=0.1)
    losses: list[float] = []
    _batchnorms_train(student)
    learner = parallel(student)
    try:
        for batch in itertools.islice(_endless(epochs), steps):
            optimizer.zero_grad(set_to_none=True)
            loss = _loss(learner, teacher, batch, config)
            if not loss.item() < float("inf"):
                raise CalibrationError(
                    f"finetuning: the loss is {loss.item()}; lower learning_rate={config.learning_rate}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            mean_gradients_(layers)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            on_step()
    finally:
        student.eval()
    _share_batchnorms_(student)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


def _loss(student: nn.Module, teacher: nn.Module, batch: Batch, config: FinetuningConfig) -> Tensor:
    if config.outputs:
        return outputs_to_teacher(student, teacher, batch, config.outputs)
    with torch.no_grad():
        target = logits_of(batch.call(teacher))
    return kl_to_teacher(logits_of(batch.call(student)), target)


def _endless(epochs: Callable[[], Iterable[Batch]]) -> Iterator[Batch]:
    while True:
        empty = True
        for batch in epochs():
            empty = False
            yield batch
        if empty:
            raise CalibrationError(
                "the calibration data is empty on a second walk: give a DataLoader or a list of batches"
            )


@torch.no_grad()
def _share_batchnorms_(student: nn.Module) -> None:
    """Give batch norms the mean of the statistics that processes have gathered, each from its own part of the data."""
    if processes() > 1:
        norms = [m for m in student.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        statistics = [t for m in norms for t in (m.running_mean, m.running_var) if t is not None]
        sum_(statistics)
        for tensor in statistics:
            tensor /= processes()


def _batchnorms_train(student: nn.Module) -> None:
    """Evaluation mode, except that batch norms normalise by the batch and update their statistics."""
    student.eval()
    for module in student.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
