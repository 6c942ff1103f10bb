"""Block-wise reconstruction: train each block so that it gives the float block's outputs on the student's inputs.

A block is a residual block or a few layers in a chain. One after the other they are trained by themselves, so the
cost is that of a few hundred passes through one block, and a few hundred unlabelled samples suffice.
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
from bgd_plugin.training.loss import kl_to_teacher

__all__ = ["Reconstruction", "reconstruct_", "reconstruction_steps"]

_HELDOUT = 8  # one chunk of samples in so many judges the training


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """What the training of the blocks brought.

    Attributes:
        blocks: number of trained blocks, and of those whose training was taken back.
        before, after: the mean over blocks of the loss on samples kept aside.
    """

    blocks: int
    taken_back: int
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Some samples: what goes into the student's block, and what the float block makes of what goes into it."""

    inputs: Batch
    target: Any


def reconstruct_(
    student: fx.GraphModule,
    reference: fx.GraphModule,
    batches: Sequence[Batch],
    config: ReconstructionConfig,
    generator: Callable[[str], torch.Generator],
    on_step: Callable[[], None] = lambda: None,
) -> Reconstruction:
    """Train every block of the student that has quantized layers, the lowest first; codes stay as they are.

    Trained are the codebooks, biases, the factors and summands of norms, and the convolutions that stay float; batch
    norms work with their running statistics. The loss is the squared error of the block's output, in units of the
    float output's variance; for the last block, KL to the float network's logits. One part in eight of the samples is
    kept aside: a block that training leaves no better on those is put back as it was.

    Args:
        student: with product-quantized modules, in evaluation mode; trained tensors are replaced, not written to.
        reference: the same graph with float modules.
        batches: calibration data.
        generator: random numbers for a block, by name.
        on_step: called after each step.

    Raises:
        CalibrationError: the loss is not finite.

    **Source**: Li et al., BRECQ, arXiv 2102.05426, section 3.2, here for codebooks.
    """
    losses: list[tuple[float, float]] = []
    mine, theirs = list(batches), list(batches)
    blocks = partition(student, _layers(student))
    for block in blocks:
        trained, exact = block_module(student, block), block_module(reference, block)
        targets = _outputs(exact, theirs)
        if block.layers:
            chunks = [c for pair in zip(mine, targets, strict=True) for c in _chunks(*pair, config.batch_size)]
            losses.append(
                _train_block(trained, chunks, block is blocks[-1], config, generator(block.layers[0]), on_step)
            )
        if block is not blocks[-1]:
            mine, theirs = [Batch((value,)) for value in _outputs(trained, mine)], [Batch((t,)) for t in targets]
    return Reconstruction(
        blocks=len(losses),
        taken_back=sum(after >= before for before, after in losses),
        before=sum(before for before, _ in losses) / len(losses),
        after=sum(min(pair) for pair in losses) / len(losses),
    )


def reconstruction_steps(student: fx.GraphModule, layers: Collection[str], config: ReconstructionConfig) -> int:
    """Gradient steps that `reconstruct_` will take for a network with quantized modules at `layers`."""
    return config.steps * sum(1 for block in partition(student, layers) if block.layers)


def _layers(student: nn.Module) -> set[str]:
    return {path for path, module in student.named_modules() if isinstance(module, PQModule)}


@torch.no_grad()
def _outputs(block: nn.Module, batches: Sequence[Batch]) -> list[Any]:
    return [batch.call(block) for batch in batches]


def _chunks(inputs: Batch, target: Any, size: int) -> list[_Chunk]:
    """A batch in pieces of at most `size` samples; whole where its tensors do not have the samples in front."""
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


def _train_block(
    block: fx.GraphModule,
    chunks: list[_Chunk],
    is_last: bool,
    config: ReconstructionConfig,
    generator: torch.Generator,
    on_step: Callable[[], None],
) -> tuple[float, float]:
    """Train a block; returns its loss on the samples kept aside, before and after."""
    heldout = chunks[:: max(2, _HELDOUT)][: len(chunks) // 2] or chunks
    aside = {id(chunk) for chunk in heldout}
    fitted = [chunk for chunk in chunks if id(chunk) not in aside] or chunks
    before = _mean_loss(block, heldout, is_last)
    trained = _trainable(block)
    kept = [(module, name, module._parameters[name]) for module, name in trained]
    parameters = [_own(module, name) for module, name in trained]
    optimizer = torch.optim.Adam(
        [{"params": [p], "lr": config.learning_rate * _size_of(p)} for p in parameters], betas=(0.9, 0.99)
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    order: list[int] = []
    for _ in range(config.steps):
        order = order or torch.randperm(len(fitted), generator=generator).tolist()
        optimizer.zero_grad(set_to_none=True)
        loss = _loss(block, fitted[order.pop()], is_last)
        if not loss.item() < float("inf"):
            raise CalibrationError(
                f"reconstruction: the loss of a block is {loss.item()}; lower learning_rate={config.learning_rate}"
            )
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        on_step()
    for parameter in parameters:
        parameter.requires_grad_(False)
    after = _mean_loss(block, heldout, is_last)
    if after >= before:
        for module, name, old in kept:
            module._parameters[name] = old
    return before, after


def _trainable(block: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every float parameter of a block, by its owner and name, each once."""
    found: dict[int, tuple[nn.Module, str]] = {}
    for module in block.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                found.setdefault(id(parameter), (module, name))
    return list(found.values())


def _own(module: nn.Module, name: str) -> nn.Parameter:
    """A parameter's copy in its place: others may share the old tensor."""
    old = module._parameters[name]
    assert old is not None
    new = nn.Parameter(old.detach().clone())
    module._parameters[name] = new
    return new


def _size_of(parameter: Tensor) -> float:
    """What a step is measured by: the root mean square of the values."""
    return max(1e-3, float(parameter.detach().float().square().mean().sqrt()))


@torch.no_grad()
def _mean_loss(block: nn.Module, chunks: Sequence[_Chunk], is_last: bool) -> float:
    return sum(_loss(block, chunk, is_last).item() for chunk in chunks) / len(chunks)


def _loss(block: nn.Module, chunk: _Chunk, is_last: bool) -> Tensor:
    output = chunk.inputs.call(block)
    if is_last:
        return kl_to_teacher(logits_of(output), logits_of(chunk.target))
    target: Tensor = chunk.target
    error: Tensor = (output - target).square().mean() / target.var().clamp(min=1e-12)
    return error
