"""Sensitivity: the effect of an error in each layer on the network's output, measured for a budget before the fit.

Two walks run side by side over the float network. At each layer the first one, over batches all over the calibration
data, gives the moments of the inputs, and from them the expected error of each block and codebook size. The second one,
over a few samples, runs to the end of the network with only this layer roughly quantized, and shows the effect on the
output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from bgd_plugin.calibration import (
    Batch,
    LayerInputs,
    Rerun,
    Walk,
    embedding_inputs,
)
from bgd_plugin.config import BGDConfig
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import FoundLayer, batchnorms_in_parts, following_batchnorm
from bgd_plugin.planning.candidates import block_sizes, codebook_sizes, fitted_sizes
from bgd_plugin.planning.extrapolate import losses_by_error
from bgd_plugin.planning.layer_facts import LayerFacts, layer_facts, narrow_error, roughly_quantized, rounding_error
from bgd_plugin.planning.losses import Sensitivity
from bgd_plugin.planning.outputs import Measure, Scale
from bgd_plugin.planning.perturbation import Perturbation, bias_of, has_channel_rows, perturbed
from bgd_plugin.planning.reference import Reference
from bgd_plugin.planning.samples import few_samples, spread
from bgd_plugin.planning.window_error import window_error
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.pq.positions import positions_as_groups
from bgd_plugin.pq.rate import RateCurve, entropy_curve, quick_fit, quick_fits, sampled_positions
from bgd_plugin.support.seeds import seeded

__all__ = ["Measured", "first_node", "measure_layers", "measure_sensitivities"]

_SAMPLES = 16  # that run to the network's end once for each layer
_RUNS = 6  # over all batches, at most, that a network that is no graph takes to its end besides
_SAMPLED_BLOCKS = 1 << 13
_REFERENCE_CODEBOOK = 256
_TINY = 1e-12
_LEAST_KL = 1e-6
"""A divergence this small is what rounding has left."""
_NOTHING = 1e-30
_LEAST_SHARE = 1e-6
"""Of the largest loss for each unit of error: a layer whose error does nothing still takes what bytes are left."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is known of a layer before its fit: what its error does to the output, and an error like the one to come.

    Attributes:
        sensitivity: of the layer.
        error: of its rough quantization.
        size, loss: of that error, in the unit of `sensitivity`, and what it alone costs.
        scale: of the losses.
    """

    sensitivity: Sensitivity
    error: Perturbation
    size: float
    loss: float
    scale: Scale


def measure_sensitivities(
    network: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    config: BGDConfig,
    step: Callable[[], object],
) -> dict[str, Sensitivity]:
    """The sensitivities alone; arguments as of `measure_layers`, `step` being called after each layer."""
    return {name: one.sensitivity for name, one in measure_layers(network, batches, layers, config, step).items()}


@torch.no_grad()
def measure_layers(
    network: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    config: BGDConfig,
    step: Callable[[], object],
) -> dict[str, Measured]:
    """What each layer's error does to the output, by the layer's name.

    Where the outputs are no logits, or logits whose divergence no layer's error moves (they are next to constant, as
    those of many a network with random weights), the squared difference of the outputs is measured.

    Args:
        network: the float network, in evaluation mode; in a graph, modules return the weights of `layers`
            (`isolate_weights_`). While a layer is measured it has another weight, and then its own again.
        batches: the calibration data.
        layers: those to be measured; one whose inputs the nodes hide has no sensitivity.
        config: the settings; the method decides in which metric errors are measured.
        step: called after each layer.

    Raises:
        CalibrationError: what any walk over the calibration data may meet.
    """
    measured = _along_graph if isinstance(network, fx.GraphModule) else _by_runs
    found = measured(network, batches, layers, config, step, None)
    if found and _is_kl(found) and max(one.loss / max(one.size, _TINY) for one in found.values()) < _LEAST_KL:
        found = measured(network, batches, layers, config, lambda: None, "squared difference")
    least = _LEAST_SHARE * max((one.sensitivity.per_error() for one in found.values()), default=0.0) or _NOTHING
    return {name: dataclasses.replace(one, sensitivity=one.sensitivity.at_least(least)) for name, one in found.items()}


def _is_kl(found: Mapping[str, Measured]) -> bool:
    return all(one.scale.measure == "KL" for one in found.values())


def _along_graph(
    network: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    config: BGDConfig,
    step: Callable[[], object],
    measure: Measure | None,
) -> dict[str, Measured]:
    assert isinstance(network, fx.GraphModule)
    few, tokens = few_samples(network, batches, _SAMPLES)
    reference = Reference.of(network, few, measure)
    wide, narrow = Walk(network, spread(batches, tokens)), Walk(network, few)
    waiting = {first_node(wide, layer): layer for layer in layers if not layer.hidden}
    found: dict[str, Measured] = {}
    for node, _ in zip(wide.nodes(waiting), narrow.nodes(waiting), strict=True):
        layer = waiting[node.name]
        generator = seeded(config.seed, layer.name, "sensitivity")
        corrects = config.batchnorm != "keep" and has_channel_rows(layer)
        norm = following_batchnorm(network, layer.calls) if corrects else None
        is_embedding = layer.kind == "embedding"
        facts = layer_facts(
            embedding_inputs(layer.name, layer.matrix) if is_embedding else LayerInputs(wide, layer.name, layer.calls),
            layer,
            config,
            generator,
            norm=norm,
            has_bias=bias_of(network, layer) is not None,
        )
        found[layer.name] = _measured(narrow, facts, reference, config, generator)
        step()
        if len(found) == len(waiting):
            break  # what comes after the last layer need not run
    return found


def _by_runs(
    network: nn.Module,
    batches: Sequence[Batch],
    layers: Sequence[FoundLayer],
    config: BGDConfig,
    step: Callable[[], object],
    measure: Measure | None,
) -> dict[str, Measured]:
    """The same for a network that is not a graph.

    Each layer's loss takes a run from there to the end, so that samples are the fewer, the more layers there are: all
    of these runs come to a few runs over all batches.
    """
    samples = sum(batch.size for batch in batches)
    few, tokens = few_samples(network, batches, max(1, min(_SAMPLES, 2 * _RUNS * samples // max(1, len(layers)))))
    reference = Reference.of(network, few, measure)
    norms = batchnorms_in_parts(network) if config.batchnorm != "keep" else {}
    weights = {layer.name: layer.weight for layer in layers if layer.kind != "embedding"}
    wide, narrow = (
        Rerun(network, network, spread(batches, tokens), weights, []),
        Rerun(network, network, few, weights, [], finishes=True),
    )
    by_name = {layer.name: layer for layer in layers}
    found: dict[str, Measured] = {}
    for layer in layers:
        if layer.kind == "embedding":  # no layer's inputs are kept yet, so that each run is a whole one
            generator = seeded(config.seed, layer.name, "sensitivity")
            inputs = embedding_inputs(layer.name, layer.matrix)
            facts = layer_facts(inputs, layer, config, generator, norm=None, has_bias=False)
            found[layer.name] = _measured(narrow, facts, reference, config, generator)
            step()
    for name in wide.order:
        layer = by_name[name]
        if wide.times(name) and narrow.times(name):
            generator = seeded(config.seed, name, "sensitivity")
            narrow.inputs(name)
            norm = norms.get(layer.target) if has_channel_rows(layer) and not layer.tied else None
            inputs, has_bias = wide.inputs(name), bias_of(network, layer) is not None
            facts = layer_facts(inputs, layer, config, generator, norm=norm, has_bias=has_bias)
            found[name] = _measured(narrow, facts, reference, config, generator)
        step()
    return found


def _measured(
    walk: Walk | Rerun,
    facts: LayerFacts,
    reference: Reference,
    config: BGDConfig,
    generator: torch.Generator,
) -> Measured:
    """Error curves for each block size, and the loss that the reference's error brings."""
    shape = tuple(facts.layer.matrix.shape)
    sizes = [d for d in block_sizes(shape) if codebook_sizes(shape, d)]
    scaled = facts.weight * facts.scale[..., None]
    usual = _usual_block(sizes, shape)
    curves, entropy = [], None
    for d in sizes:
        blocks, metrics = positions_as_groups(scaled, facts.metrics(d))
        sample = sampled_positions(blocks, metrics, _SAMPLED_BLOCKS, generator)
        _require_finite(facts.layer.name, *sample)
        fits = quick_fits(*sample, fitted_sizes(shape, d), generator=generator)
        curves.append(RateCurve.of(d, fits))
        entropy = entropy_curve(*sample) if d == 1 else entropy
        if d == usual:
            k = max(k for k in codebook_sizes(shape, d) if k <= _REFERENCE_CODEBOOK)
            fit = quick_fit(*sample, k, generator=generator)
    error = Perturbation.of(facts, roughly_quantized(scaled, facts, fit.codebook) / facts.scale[..., None])
    size = max(fit.error, _TINY)
    with perturbed(walk.student, error):
        loss, measured, shifts = reference.loss(walk)
    reason = f"{measured} {loss:.2g} if only this layer is quantized, at {usual}×{len(fit.codebook)}"
    losses = losses_by_error(shifts, size, loss)
    sensitivity = Sensitivity(
        curves=tuple(curves),
        losses=losses,
        reason=reason,
        entropy=entropy,
        windows=_windows(scaled, facts, config),
        rounding=rounding_error(scaled, facts) if config.codebook_storage == "int8" else 0.0,
        narrow=narrow_error(facts),
    )
    return Measured(sensitivity=sensitivity, error=error, size=size, loss=loss, scale=reference.scale)


def _windows(scaled: Tensor, facts: LayerFacts, config: BGDConfig) -> float:
    """The layer's error with trellis codes, if the settings allow them."""
    error = window_error(scaled, facts.metrics(1)[..., 0, 0]) if config.codes == TRELLIS else None
    return math.inf if error is None else error


def _require_finite(name: str, *tensors: Tensor) -> None:
    """Refuse a layer whose weights and inputs are numbers, but with squares that are none.

    Raises:
        CalibrationError: naming the layer.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise CalibrationError(
            f"layer '{name}': its weights or inputs are so large that their squares overflow, so what its error does "
            "to the output cannot be measured; keep it float by overrides, or fix the sizes with max_divergence=None"
        )


def _usual_block(sizes: Sequence[int], shape: Sequence[int]) -> int:
    wanted = 4 if len(shape) == 2 or math.prod(shape[2:]) == 1 else math.prod(shape[2:])
    return min(sizes, key=lambda d: (abs(d - wanted), d))


def first_node(walk: Walk, layer: FoundLayer) -> str:
    """The node before which a layer is met: its first call, or the node that reads its weight for that call."""
    for node in walk.order:
        if (node.op == "call_module" and node.target == layer.target) or node.name == layer.calls[0]:
            return node.name
    raise AssertionError(f"{layer.name} has no node")
