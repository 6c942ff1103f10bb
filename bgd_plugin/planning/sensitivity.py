"""What an error in each layer does to the network's output: measured, before anything is quantized, for a budget.

Two walks side by side over the float network. At each layer one of them, over all calibration batches, gives the
inputs' moments, and from them the error that each block and codebook size is expected to make. The other one, over some
samples, then runs to its end with this layer alone roughly quantized, and shows what that error does to the output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch, LayerInputs, Walk, first_samples, sampled_inputs
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import FoundLayer, following_batchnorm
from bgd_plugin.planning.answers import Measure, output_loss
from bgd_plugin.planning.candidates import Sensitivity, block_sizes, codebook_sizes, fitted_sizes
from bgd_plugin.pq.blocks import from_blocks
from bgd_plugin.pq.feedback import damped, diagonal_blocks, encode_with_feedback, nearest
from bgd_plugin.pq.full_gram import positions_as_groups
from bgd_plugin.pq.rate import quick_fit, rate_curve, sampled_positions
from bgd_plugin.support.seeds import seeded

__all__ = ["measure_sensitivities"]

_ROWS = 4096  # of a layer's inputs
_SAMPLES = 32  # that run to the network's end once for each layer
_SAMPLED_BLOCKS = 1 << 14
_DAMPING = 0.2
_MAX_COLUMNS = 8192
_REFERENCE_CODEBOOK = 256
_TINY = 1e-12
_LEAST_KL = 1e-6
"""A divergence this small is what rounding has left."""
_NOTHING = 1e-30
_LEAST_SHARE = 1e-6
"""Of the largest loss for each unit of error: a layer whose error does nothing still takes what bytes are left."""


@torch.no_grad()
def measure_sensitivities(
    network: fx.GraphModule, batches: Sequence[Batch], layers: Sequence[FoundLayer], config: BGDConfig, step: Any
) -> dict[str, Sensitivity]:
    """The sensitivity of layers, by name.

    Where no layer's error moves the logits' divergence (the logits are next to constant, as those of many a network
    with random weights), the squared difference of the outputs is measured instead.

    Args:
        network: the traced float network, in evaluation mode, in which modules return the weights of `layers`
            (`isolate_weights_`); while a layer is measured it has another weight, and then its own again.
        batches: the calibration data.
        layers: those to be measured; one whose inputs the nodes hide has no sensitivity.
        config: the settings; the method decides in which metric errors are measured.
        step: called after each layer.

    Raises:
        CalibrationError: what any walk over the calibration data may meet.
    """
    seen = [layer for layer in layers if not layer.hidden]
    found = _measured(network, batches, seen, config, step, measure="KL")
    if found and max(s.per_error for s in found.values()) < _LEAST_KL:
        found = _measured(network, batches, seen, config, lambda: None, measure="squared difference")
    least = _LEAST_SHARE * max((s.per_error for s in found.values()), default=0.0) or _NOTHING
    return {name: dataclasses.replace(s, per_error=max(s.per_error, least)) for name, s in found.items()}


def _measured(
    network: fx.GraphModule,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    config: BGDConfig,
    step: Any,
    measure: Measure,
) -> dict[str, Sensitivity]:
    few = first_samples(batches, _SAMPLES)
    outputs = [batch.call(network) for batch in few]
    wide, narrow = Walk(network, batches), Walk(network, few)
    waiting = {_first_node(wide, layer): layer for layer in layers}
    found: dict[str, Sensitivity] = {}
    for node, _ in zip(wide.nodes(), narrow.nodes(), strict=True):
        layer = waiting.get(node.name)
        if layer is not None:
            generator = seeded(config.seed, layer.name, "sensitivity")
            facts = _facts(network, wide, layer, config, generator)
            found[layer.name] = _sensitivity(narrow, facts, outputs, generator, measure)
            step()
    return found


@dataclass(kw_only=True)
class _Facts:
    """What is known of a layer from its inputs.

    Attributes:
        layer: the layer.
        weight: `[groups, rows_per_group, columns]`.
        mean: of the inputs `[groups, columns]`.
        gram: damped second moments around the mean, or around zero if nothing takes a mean out, `[groups, columns,
            columns]`, float64.
        covariance, damping: the same without damping, float32; and what was added, in units of the mean diagonal.
        root: V, upper triangular, gram = V Vᵀ; None where blocks are measured by the gram alone.
        scale: `[groups, rows_per_group]`, what a row's error is multiplied with.
        norm: path of the batch norm that follows.
        takes_mean: whether a bias or a batch norm takes out the mean of the layer's error.
    """

    layer: FoundLayer
    weight: Tensor
    mean: Tensor
    gram: Tensor
    covariance: Tensor
    damping: float
    root: Tensor | None
    scale: Tensor
    norm: str | None
    takes_mean: bool

    def metrics(self, block_size: int) -> Tensor:
        """What an error counts at each block position: `[groups, blocks_per_row, d, d]`.

        With error feedback the later blocks make good what they can, and what remains is measured by (H⁻¹_II)⁻¹,
        H⁻¹ that of the columns from block I on: V_II V_IIᵀ.
        """
        if self.root is None:
            metrics = diagonal_blocks(self.gram, block_size)
            return metrics.mean((0, 1), keepdim=True).expand_as(metrics)
        blocks = diagonal_blocks(self.root, block_size)
        return blocks @ blocks.mT


def _facts(
    network: fx.GraphModule, walk: Walk, layer: FoundLayer, config: BGDConfig, generator: torch.Generator
) -> _Facts:
    rows = sampled_inputs(LayerInputs(walk, layer.name, layer.calls), _ROWS, generator).rows
    groups, count, columns = rows.shape
    weight = layer.weight.detach().float().reshape(groups, -1, columns)
    norm = following_batchnorm(network, layer.calls) if config.batchnorm != "keep" else None
    full = config.method == "full"
    takes_mean = norm is not None or (full and _bias(network, layer) is not None)
    mean = rows.mean(1)
    centred = rows - mean[:, None] if takes_mean else rows
    second = (centred.mT @ centred) / count
    damping = min(1.0, _DAMPING * (1 + columns / count))
    gram = damped(second, damping)
    # With few rows feedback would hide the error on just the samples that show its cost.
    has_root = full and columns <= _MAX_COLUMNS and count >= 2 * columns
    root = torch.linalg.cholesky(gram.flip((1, 2))).flip((1, 2)) if has_root else None
    scale = torch.ones_like(weight[..., 0])
    power = ((weight @ second) * weight).sum(2).clamp(min=0)
    if full and norm is not None:
        alive = power > 1e-6 * power.mean()
        scale = torch.where(alive, power, power.mean().clamp(min=_TINY)).rsqrt()
    elif float(power.sum()) > 0:
        scale = scale * float(power.mean()) ** -0.5
    return _Facts(
        layer=layer,
        weight=weight,
        mean=mean,
        gram=gram,
        covariance=second,
        damping=damping,
        root=root,
        scale=scale,
        norm=norm,
        takes_mean=takes_mean,
    )


def _sensitivity(
    walk: Walk,
    facts: _Facts,
    outputs: Sequence[Any],
    generator: torch.Generator,
    measure: Measure,
) -> Sensitivity:
    """Error curves for each block size, and the loss that the reference's error brings."""
    shape = tuple(facts.layer.weight.shape)
    sizes = [d for d in block_sizes(shape) if codebook_sizes(shape, d)]
    scaled = facts.weight * facts.scale[..., None]
    reference = _reference_block(sizes, shape)
    curves = []
    for d in sizes:
        blocks, metrics = positions_as_groups(scaled, facts.metrics(d))
        sample = sampled_positions(blocks, metrics, _SAMPLED_BLOCKS, generator)
        curves.append(rate_curve(*sample, fitted_sizes(shape, d), generator=generator))
        if d == reference:
            k = max(k for k in codebook_sizes(shape, d) if k <= _REFERENCE_CODEBOOK)
            fit = quick_fit(*sample, k, generator=generator)
    rough = _roughly_quantized(scaled, facts, fit.codebook) / facts.scale[..., None]
    loss, measured = _loss_alone(walk, facts, rough, outputs, measure)
    reason = f"alone at {reference}×{len(fit.codebook)} it costs {loss:.2g} ({measured})"
    return Sensitivity(curves=tuple(curves), per_error=loss / max(fit.error, _TINY), reason=reason)


def _reference_block(sizes: Sequence[int], shape: Sequence[int]) -> int:
    wanted = 4 if len(shape) == 2 or math.prod(shape[2:]) == 1 else math.prod(shape[2:])
    return min(sizes, key=lambda d: (abs(d - wanted), d))


def _roughly_quantized(scaled: Tensor, facts: _Facts, codebook: Tensor) -> Tensor:
    """The whole (scaled) weight in the codewords of a quick fit, `[groups, rows_per_group, columns]`."""
    groups, rows, columns = scaled.shape
    if facts.root is not None:
        codes = encode_with_feedback(scaled.flatten(0, 1), codebook, facts.covariance, damping=facts.damping)
        return functional.embedding(codes, codebook).reshape(groups, rows, columns)
    blocks, metrics = positions_as_groups(scaled, facts.metrics(codebook.shape[1]))
    codes = nearest(blocks, torch.linalg.cholesky(metrics.double()).to(blocks), codebook)
    decoded = functional.embedding(codes, codebook)  # [groups · blocks_per_row, rows_per_group, d]
    return decoded.reshape(groups, -1, rows, codebook.shape[1]).transpose(1, 2).reshape(groups, rows, columns)


def _loss_alone(
    walk: Walk, facts: _Facts, rough: Tensor, outputs: Sequence[Any], measure: Measure
) -> tuple[float, str]:
    """The loss of the network's output when this layer alone has its rough weight; means are corrected as in a run."""
    total, samples, measured = 0.0, 0, ""
    with _replaced(walk.student, facts, rough):
        for index, exact in enumerate(outputs):
            loss, measured = output_loss(walk.finish(index), exact, measure)
            size = _samples_in(exact)
            total, samples = total + size * loss, samples + size
    return total / max(1, samples), measured


def _samples_in(output: Any) -> int:
    return next((t.shape[0] for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.ndim), 1)


@contextmanager
def _replaced(network: fx.GraphModule, facts: _Facts, rough: Tensor) -> Iterator[None]:
    """The network with one layer's weight replaced, and the mean and spread of the layer's output kept."""
    module: Any = network.get_submodule(facts.layer.target)
    weight, bias = module.weight, _bias(network, facts.layer)
    norm: Any = network.get_submodule(facts.norm) if facts.norm else None
    if norm is not None:
        rough = rough * _spread_ratio(facts, rough)[..., None]
    shift = ((facts.weight - rough) @ facts.mean.unsqueeze(2)).flatten()
    mean: Any = norm.running_mean if norm is not None else None
    try:
        module.weight = nn.Parameter(from_blocks(rough, weight.shape).to(weight), requires_grad=False)
        if norm is not None:
            norm.running_mean = mean - shift.to(mean)
        elif facts.takes_mean and bias is not None:
            module.bias = nn.Parameter(bias + shift.to(bias), requires_grad=False)
        yield
    finally:
        module.weight = weight
        if norm is not None:
            norm.running_mean = mean
        elif bias is not None:
            module.bias = bias


def _spread_ratio(facts: _Facts, rough: Tensor) -> Tensor:
    """For each row, the output's standard deviation with the exact weight over that with the rough one."""
    gram = facts.covariance
    exact = ((facts.weight @ gram) * facts.weight).sum(2).clamp(min=0)
    found = ((rough @ gram) * rough).sum(2).clamp(min=0)
    ratio = ((exact + _TINY) / (found + _TINY)).sqrt()
    return ratio.clamp(0.05, 20.0)


def _bias(network: fx.GraphModule, layer: FoundLayer) -> Any:
    """The bias of a module that is called; that of a function's call is not the module's."""
    return None if layer.functional else getattr(network.get_submodule(layer.target), "bias", None)


def _first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is met: its first call, or the node that reads its weight for that call."""
    for node in walk.order:
        if (node.op == "call_module" and node.target == layer.target) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")
