"""Block-wise reconstruction: train each block to return the float block's outputs on the student's inputs.

A block is a residual block or a few consecutive layers. Blocks are trained one at a time, so each costs a few hundred
passes through that block, and a few hundred unlabelled samples are enough.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, logits_of
from bgd_plugin.config import ReconstructionConfig
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import block_module, partition
from bgd_plugin.nn import PQModule
from bgd_plugin.support.steps import Part, Steps
from bgd_plugin.training.adam import relative_adam
from bgd_plugin.training.loss import kl_to_teacher

__all__ = ["BlockTraining", "Reconstruction", "chunks_of", "reconstruct_", "reconstruction_steps"]

_HELDOUT = 8  # every eighth chunk of samples is held out


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Result of training the blocks.

    Attributes:
        blocks, taken_back: number of trained blocks, and of those whose training was undone.
        before, after: the mean over blocks of the loss on held-out samples.
    """

    blocks: int
    taken_back: int
    before: float
    after: float

    @classmethod
    def of(cls, losses: Sequence[tuple[float, float]]) -> Reconstruction:
        """From the losses of each block, before and after."""
        count = max(1, len(losses))
        return cls(
            blocks=len(losses),
            taken_back=sum(after >= before for before, after in losses),
            before=sum(before for before, _ in losses) / count,
            after=sum(min(pair) for pair in losses) / count,
        )


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some samples: the inputs of the student's block, and the float block's outputs for its own inputs."""

    inputs: Batch
    target: Any


def reconstruct_(
    student: fx.GraphModule,
    reference: fx.GraphModule,
    batches: Sequence[Batch],
    config: ReconstructionConfig,
    generator: Callable[[str], torch.Generator],
    steps: Callable[[int], Steps] = lambda number: Steps(),
    *,
    fixed: Collection[str] = (),
) -> Reconstruction:
    """Train every block of the student that has quantized layers, in order; codes stay fixed.

    Codebooks, biases, scales and shifts of norms, and float convolutions are trained; batch norms use their running
    statistics. The loss is the squared error of the block's output relative to the float output's variance; for the
    last block, KL to the float network's logits. One eighth of the samples is held out: if training does not improve a
    block on them, its training is undone.

    Args:
        student: with product-quantized modules, in evaluation mode; trained tensors are replaced, not written to.
        reference: the same graph with float modules.
        batches: calibration data.
        generator: returns the generator for a block, given its name.
        steps: returns the `Steps` that save and report a block's progress, given its number.
        fixed: names of the student's parameters that are not trained.

    Raises:
        CalibrationError: the loss is not finite.

    **Source**: Li et al., BRECQ, arXiv 2102.05426, section 3.2, here for codebooks.
    """
    losses: list[tuple[float, float]] = []
    mine, theirs = list(batches), list(batches)
    blocks = partition(student, _layers(student))
    for number, block in enumerate(blocks):
        trained, exact = block_module(student, block), block_module(reference, block)
        targets = _outputs(exact, theirs)
        if block.layers:
            chunks = [c for pair in zip(mine, targets, strict=True) for c in chunks_of(*pair, config.batch_size)]
            training = BlockTraining(student, trained, chunks, is_last=block is blocks[-1], fixed=fixed)
            losses.append(training.run_(config, generator(block.layers[0]), steps(number)))
        if block is not blocks[-1]:
            mine, theirs = [Batch((value,)) for value in _outputs(trained, mine)], [Batch((t,)) for t in targets]
    return Reconstruction.of(losses)


def reconstruction_steps(student: fx.GraphModule, layers: Collection[str], config: ReconstructionConfig) -> int:
    """Number of gradient steps of `reconstruct_` for a network with quantized modules at `layers`."""
    return config.steps * sum(1 for block in partition(student, layers) if block.layers)


def _layers(student: nn.Module) -> set[str]:
    return {path for path, module in student.named_modules() if isinstance(module, PQModule)}


@torch.no_grad()
def _outputs(block: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    return [batch.call(block) for batch in batches]


def chunks_of(inputs: Batch, target: Any, size: int) -> list[_Chunk]:
    """Split a batch and its target outputs into chunks of at most `size` samples.

    They stay whole if samples are not along the first dimension.
    """
    leaves = [t for t in pytree.tree_leaves((inputs.args, inputs.kwargs, target)) if isinstance(t, Tensor)]
    count = inputs.size
    if not isinstance(target, Tensor) or any(t.ndim == 0 or t.shape[0] != count for t in leaves):
        return [_Chunk(inputs=inputs, target=target)]
    pieces = math.ceil(count / size)
    bounds = [round(i * count / pieces) for i in range(pieces + 1)]
    result = []
    for first, last in itertools.pairwise(bounds):
        part = slice(first, last)
        args, kwargs = pytree.tree_map_only(Tensor, operator.itemgetter(part), (inputs.args, inputs.kwargs))
        result.append(_Chunk(inputs=Batch(args, kwargs), target=target[part]))
    return result


class BlockTraining:
    """The training of one block on some of the samples, evaluated on the others."""

    def __init__(
        self, student: nn.Module, block: nn.Module, chunks: list[_Chunk], *, is_last: bool, fixed: Collection[str] = ()
    ) -> None:
        self._block, self._is_last = block, is_last
        self._heldout = chunks[::_HELDOUT][: len(chunks) // 2] or chunks
        aside = {id(chunk) for chunk in self._heldout}
        self._fitted = [chunk for chunk in chunks if id(chunk) not in aside] or chunks
        self._owners = _owners(student, block, fixed)

    def run_(self, config: ReconstructionConfig, generator: torch.Generator, steps: Steps) -> tuple[float, float]:
        """Train the block; returns its loss on the held-out samples, before and after.

        Raises:
            CalibrationError: the loss is not finite.
        """
        before = self._heldout_loss()
        old = [owners[0][0]._parameters[owners[0][1]] for owners in self._owners]
        new = [nn.Parameter(parameter.detach().clone()) for parameter in old if parameter is not None]
        self._put_(new)  # copies: other modules may share the old tensors
        optimizer, schedule = relative_adam(new, config.learning_rate, config.steps)
        order: list[int] = []
        parts: dict[str, Part] = {"block": self._block, "optimizer": optimizer, "schedule": schedule}
        for _ in steps.run(config.steps, **parts, generator=generator, order=order):
            if not order:
                order.extend(torch.randperm(len(self._fitted), generator=generator, device=generator.device).tolist())
            optimizer.zero_grad(set_to_none=True)
            loss = self._loss(self._fitted[order.pop()])
            if not loss.item() < float("inf"):
                raise CalibrationError(
                    f"reconstruction: the loss of a block is {loss.item()}; lower learning_rate={config.learning_rate}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        for parameter in new:
            parameter.requires_grad_(False)
        after = self._heldout_loss()
        if after >= before:
            self._put_([parameter for parameter in old if parameter is not None])
        return before, after

    def _put_(self, parameters: Sequence[nn.Parameter]) -> None:
        for owners, parameter in zip(self._owners, parameters, strict=True):
            for module, name in owners:
                module._parameters[name] = parameter

    @torch.no_grad()
    def _heldout_loss(self) -> float:
        return sum(self._loss(chunk).item() for chunk in self._heldout) / len(self._heldout)

    def _loss(self, chunk: _Chunk) -> Tensor:
        output = chunk.inputs.call(self._block)
        if self._is_last:
            return kl_to_teacher(logits_of(output), logits_of(chunk.target))
        target: Tensor = chunk.target
        error: Tensor = (output - target).square().mean() / target.var().clamp(min=1e-12)
        return error


def _owners(student: nn.Module, block: nn.Module, fixed: Collection[str]) -> list[list[tuple[nn.Module, str]]]:
    """Every parameter of a block that is trained, with all modules that hold it, so that ties are preserved."""
    left = {id(p) for name, p in student.named_parameters(remove_duplicate=False) if name in fixed}
    holders: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in student.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((module, name))
    wanted = {id(p): p for p in block.parameters() if p.is_floating_point() and id(p) not in left}
    return [holders[key] for key in wanted if key in holders]
