"""Distillation of one layer's codewords, right after the layer is quantized."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Rerun, Walk, logits_of
from bgd_plugin.config import DistillationConfig
from bgd_plugin.errors import CalibrationError
from bgd_plugin.nn import PQModule
from bgd_plugin.support.processes import parallel, processes, unsynchronized
from bgd_plugin.support.steps import Part, Steps
from bgd_plugin.training.loss import kl_to_teacher, mean_gradients_

__all__ = ["distill_"]


def distill_(
    walk: Walk | Rerun,
    layer: PQModule,
    teacher_logits: Sequence[Tensor],
    config: DistillationConfig,
    generator: torch.Generator,
    steps: Steps | None = None,
    *,
    tokens: Sequence[Tensor | None] | None = None,
) -> float:
    """Train the layer's codebook to match the teacher's logits; codes and everything else stay fixed.

    Earlier layers are finished, so their outputs are the walk's live values: each step runs the network only from this
    layer on.

    Args:
        walk: positioned at the layer's node, which has not run yet. For a network without a graph, each step runs the
            whole network.
        layer: the student's module at that node.
        teacher_logits: one tensor per calibration batch, of the shapes in `kl_to_teacher`.
        steps: saves and reports progress.
        tokens: for each calibration batch, `[batch, tokens]`, which tokens count; None: all.

    Returns:
        the mean loss over the last tenth of the steps.

    Raises:
        CalibrationError: the loss is not finite.

    **Source**: arXiv 1907.05686, section 3.2, "codeword finetuning".
    """
    optimizer = torch.optim.SGD(
        [layer.codebook], lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    layer.codebook.requires_grad_(True)
    order: list[int] = []
    losses: list[float] = []
    parts: dict[str, Part] = {"layer": layer, "optimizer": optimizer, "generator": generator}
    rest = parallel(_Rest(walk, layer))
    for _ in (steps or Steps()).run(config.steps, **parts, order=order, losses=losses):
        optimizer.zero_grad(set_to_none=True)
        batches = _next_batches(order, teacher_logits, -(-config.batch_size // processes()), generator)
        samples = sum(teacher_logits[b].shape[0] for b in batches)
        loss_of_step = 0.0
        for number, b in enumerate(batches, 1):  # one may come twice: the end of a walk, and again early in the next
            with nullcontext() if number == len(batches) else unsynchronized(rest):
                loss = kl_to_teacher(rest(b), teacher_logits[b], tokens[b] if tokens else None)
                loss = loss * (teacher_logits[b].shape[0] / samples)
                loss.backward()  # type: ignore[no-untyped-call]
            loss_of_step += loss.item()
        if not loss_of_step < float("inf"):
            raise CalibrationError(
                f"distillation of layer {walk.place!r}: the loss is {loss_of_step}; "
                f"lower learning_rate={config.learning_rate}"
            )
        mean_gradients_([layer])
        optimizer.step()
        losses.append(loss_of_step)
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(tail) / len(tail)


class _Rest(nn.Module):
    """The network from a layer on; only the layer's codebook is trained."""

    def __init__(self, walk: Walk | Rerun, layer: PQModule) -> None:
        super().__init__()
        self.layer = layer
        self._walk = walk

    def forward(self, batch: int) -> Tensor:
        """The logits of a calibration batch."""
        return logits_of(self._walk.finish(batch))


def _next_batches(
    order: list[int], teacher_logits: Sequence[Tensor], batch_size: int, generator: torch.Generator
) -> list[int]:
    """Calibration batches for one step, in shuffled order; `order` holds the rest of the current epoch."""
    chosen: list[int] = []
    while not chosen or sum(teacher_logits[b].shape[0] for b in chosen) < batch_size:
        if not order:
            order.extend(torch.randperm(len(teacher_logits), generator=generator, device=generator.device).tolist())
        chosen.append(order.pop())
        if len(chosen) == len(teacher_logits):
            break
    return chosen
