"""Each layer's output error on images that the fit has not seen: the default method against the paper's EM, same bytes.

Run `python -m tests.benchmarks.layer_error` (`make bench-layer_error`). Every layer with 10,000 weights or more is
fitted on its inputs in the *float* network, to itself (`asymmetric_step=0`), without any training, by both methods at
the same block and codebook size; then ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖² is measured on the inputs X from other images.

The layer is fitted by itself, as one with no batch norm and no bias behind it that could take up a part of the error.
Beside it stands the error without its mean of a fit that leaves the mean, and each row's scale, to what is behind it.

Ends with status 1 unless the default's error is the lower one in every layer, and lower by 35% in the middle.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import InputSample, LayerInputs, Walk, collect_batches, sampled_inputs
from bgd_plugin.fitting import METHODS, LayerContext, output_error
from bgd_plugin.graph import FoundLayer, copy_module, following_batchnorm, trace
from bgd_plugin.planning.survey import surveyed
from bgd_plugin.planning.types import PlannedLayer
from bgd_plugin.support.tables import table
from tests.benchmarks.peers.subjects import SUBJECTS

LEAST_WEIGHTS = 10_000
TARGET_MEDIAN = 0.35
_JUDGED_IMAGES = 250
_JUDGED_ROWS = 8192
CONFIGS = {
    "paper": bgd.BGDConfig(method="em", max_divergence=None),
    "default": bgd.BGDConfig(asymmetric_step=0.0, max_divergence=None),
}


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """Relative output errors by method: of the layer by itself, and without their mean where that is left to others."""

    name: str
    weights: int
    block_size: int
    codebook_size: int
    error: dict[str, float]
    centred: dict[str, float]

    @property
    def gain(self) -> float:
        """How much lower the default's error is, as a share of the paper's."""
        return 1 - self.error["default"] / self.error["paper"]


def layer_errors(model: nn.Module, fitted: Sequence[Tensor], judged: Sequence[Tensor]) -> Iterator[LayerError]:
    """Fit each layer on the inputs that `fitted` gives it in the float network; judge on those that `judged` gives."""
    network = trace(copy_module(model)).eval()
    survey = surveyed(network, bgd.BGDConfig(max_divergence=None), original=model)
    walks = [
        Walk(network, collect_batches(images, model, device=torch.device("cpu"), forward=None), network)
        for images in (fitted, judged)
    ]
    layers = {pair[0].calls[0]: pair for pair in survey.chosen}
    for node, _ in zip(*(walk.nodes() for walk in walks), strict=True):
        if node.name in layers and layers[node.name][0].weight.numel() >= LEAST_WEIGHTS:
            layer, planned = layers[node.name]
            inputs, others = (LayerInputs(walk, layer.name, layer.calls) for walk in walks)
            sample = sampled_inputs(others, _JUDGED_ROWS, torch.Generator().manual_seed(1))
            yield _layer_error(network, layer, planned, inputs, sample)


def _layer_error(
    network: torch.fx.GraphModule, layer: FoundLayer, planned: PlannedLayer, inputs: LayerInputs, sample: InputSample
) -> LayerError:
    error, centred = {}, {}
    middle = InputSample(rows=sample.rows - sample.rows.mean(1, keepdim=True))
    behind = {
        "has_batchnorm": following_batchnorm(network, layer.calls) is not None,
        "has_bias": layer.bias is not None,
    }
    alone = dict.fromkeys(behind, False)
    for name, config in CONFIGS.items():
        error[name] = output_error(layer.weight.detach(), _decoded(layer, planned, inputs, config, alone), sample)
        centred[name] = output_error(layer.weight.detach(), _decoded(layer, planned, inputs, config, behind), middle)
    return LayerError(
        name=layer.name,
        weights=layer.weight.numel(),
        block_size=planned.block_size,
        codebook_size=planned.codebook_size,
        error=error,
        centred=centred,
    )


@torch.no_grad()
def _decoded(
    layer: FoundLayer, planned: PlannedLayer, inputs: LayerInputs, config: bgd.BGDConfig, behind: dict[str, bool]
) -> Tensor:
    """The layer's weight after one method's fit, as it multiplies the inputs."""
    context = LayerContext(layer=planned, weight=layer.weight, inputs=inputs, config=config, **behind)
    method, generator = METHODS[config.method], torch.Generator().manual_seed(0)
    fit = method.solve(context, method.collect(context, generator), generator)
    rows = nn.functional.embedding(fit.codes, fit.codebook.detach()).flatten(1)
    if fit.row_scale is not None:
        rows = rows / fit.row_scale.to(rows)[:, None]
    return rows.reshape(layer.weight.shape)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the status to end with."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.layer_error", description=main.__doc__)
    parser.add_argument("--networks", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--photos", type=Path, help="folder of labelled images for EfficientNet-Lite0: NAME_CLASS.jpg")
    parser.add_argument("--split", type=int, default=0, help="seed of the photos' two halves")
    parser.add_argument("--data", type=Path, help="folder with the four idx files of Fashion-MNIST")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    figures, holds = {}, True
    for name in options.networks:
        subject = SUBJECTS[name](options)
        images = torch.cat(list(subject.judged))[:_JUDGED_IMAGES].split(50)
        layers = list(layer_errors(subject.model, subject.calibration, images))
        figures[subject.name] = [asdict(layer) | {"gain": layer.gain} for layer in layers]
        print(f"\n{subject.name}: {subject.images}\n{_lines(layers)}", flush=True)
        gains = [layer.gain for layer in layers]
        middle = statistics.median(gains)
        holds &= min(gains) > 0 and middle >= TARGET_MEDIAN
        print(f"{len(layers)} layers, default lower in {sum(g > 0 for g in gains)}, median {middle:.1%} lower")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return int(not holds)


def _lines(layers: Sequence[LayerError]) -> str:
    header = ["layer", "weights", "d", "k", "paper", "default", "lower by", "paper, centred", "default, centred"]
    rows = [
        [x.name, x.weights, x.block_size, x.codebook_size, f"{x.error['paper']:.3%}", f"{x.error['default']:.3%}"]
        + [f"{x.gain:.1%}", f"{x.centred['paper']:.3%}", f"{x.centred['default']:.3%}"]
        for x in layers
    ]
    return table(header, rows)


if __name__ == "__main__":
    raise SystemExit(main())
