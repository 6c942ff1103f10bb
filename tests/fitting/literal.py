"""The fit of a layer from its formulas, in float64, on the inputs that it has in two networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.networks import images, randomized, vectors

__all__ = [
    "NETWORKS",
    "NINE",
    "SMALL",
    "Literal",
    "channels_of",
    "close_to",
    "fit_config",
    "literal_of",
    "quantized_network",
    "rows_of",
    "values_at",
]


SMALL = LayerConfig(block_size=4, codebook_size=8)


NINE = LayerConfig(block_size=9, codebook_size=8)


def fit_config(**fields: Any) -> BGDConfig:
    """Every layer small, nothing rounded after the fit, which sees all the data."""
    storage = {
        "codebook_storage": "float16",
        "weight_storage": "float32",
        "float_storage": "float32",
        "kept_aside": 0.0,
    }
    kinds = {"conv": NINE, "pointwise_conv": SMALL, "linear": SMALL, "first_layer": SMALL}
    return BGDConfig(**(kinds | storage | fields), max_divergence=None)


@torch.no_grad()
def values_at(network: nn.Module, path: str, data: list[Tensor], *, output: bool = False) -> Tensor:
    """What goes into a module, or comes out of it, on all the data."""
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_hook(
        lambda _, args, out: seen.append((out if output else args[0]).double().clone())
    )
    for batch in data:
        network(batch)
    hook.remove()
    return torch.cat(seen)


def rows_of(values: Tensor, layer: Any) -> Tensor:
    """Inputs of a layer as the rows that its matrix multiplies: `[groups, positions, columns]`."""
    if isinstance(layer, nn.Linear):
        return values.flatten(0, -2)[None]
    unfolded = functional.unfold(values, layer.kernel_size, padding=layer.padding, stride=layer.stride)
    return unfolded.reshape(len(values), layer.groups, -1, unfolded.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)


def channels_of(values: Tensor, groups: int) -> Tensor:
    """Outputs of a convolution, or a linear layer's, as `[groups, positions, rows_per_group]`."""
    flat = values.movedim(1, -1).flatten(0, -2)
    return flat.reshape(len(flat), groups, -1).transpose(0, 1)


@dataclass(kw_only=True)
class Literal:
    """The layer's fit from its formulas, in float64; x `[groups, n, D]`, y `[groups, n, R]`."""

    weight: Tensor
    x: Tensor
    y: Tensor
    step: float = 0.5
    damped_by: float | None = None
    """The damping, where it is not that of these rows."""

    def moments(self, x: Tensor, centred: bool) -> Tensor:
        x = x - x.mean(1, keepdim=True) if centred else x
        return x.mT @ x / x.shape[1]

    @property
    def damping(self) -> float:
        """0.2, and as much again in proportion to the columns for each row; at most 1."""
        return self.damped_by or min(1.0, 0.2 * (1 + self.x.shape[2] / self.x.shape[1]))

    def target(self, centred: bool = True) -> Tensor:
        """W + step · (H + damping · mean diag H · I)⁻¹ Xᵀ (Y − X Wᵀ), centred where something takes the mean."""
        x, y = (values - centred * values.mean(1, keepdim=True) for values in (self.x, self.y))
        w = self.weight.double().reshape(len(x), -1, x.shape[2])
        h = self.moments(self.x, centred)
        ridge = self.damping * torch.stack([h_g.diag().mean() * torch.eye(len(h_g), dtype=h.dtype) for h_g in h])
        missing = x.mT @ (y - x @ w.mT) / x.shape[1]
        return (w + self.step * torch.linalg.solve(h + ridge, missing).mT).flatten(0, 1)

    def best_step(self, centred: bool = True) -> float:
        """The step along the change solved for the first four fifths of the rows that suits the last fifth best."""
        cut = 4 * self.x.shape[1] // 5
        first = Literal(weight=self.weight, x=self.x[:, :cut], y=self.y[:, :cut], step=1.0, damped_by=self.damping)
        x, y = (v[:, cut:] - centred * v[:, cut:].mean(1, keepdim=True) for v in (self.x, self.y))
        w, whole = (v.double().reshape(len(x), -1, x.shape[2]) for v in (self.weight, first.target(centred)))
        change, missing = x @ (whole - w).mT, y - x @ w.mT
        return float((change * missing).sum() / change.square().sum())

    def scale(self) -> Tensor:
        """One over the deviation of each row's outputs."""
        target = self.target().reshape(len(self.x), -1, self.x.shape[2])
        return 1 / (self.x @ target.mT).std(1, correction=0).flatten()

    def grams(self, centred: bool) -> tuple[Tensor, Tensor]:
        """Of the first four fifths of the rows, and of the last fifth."""
        cut = 4 * self.x.shape[1] // 5
        return self.moments(self.x[:, :cut], centred), self.moments(self.x[:, cut:], centred)


def literal_of(result: nn.Module, model: nn.Module, path: str, data: list[Tensor], step: float = 0.5) -> Literal:
    """For a layer of a quantized network: the student's inputs, and what the float layer's matrix makes of its own."""
    layer: Any = model.get_submodule(path)
    mine, theirs = (rows_of(values_at(network, path, data), layer) for network in (result, model))
    weight = layer.weight.detach().flatten(1)
    y = theirs @ weight.double().reshape(len(theirs), -1, theirs.shape[2]).mT
    return Literal(weight=weight, x=mine, y=y, step=step)


def close_to(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.reshape(found.shape), rtol=2e-3, atol=2e-5)


# layers at "2": the layer at "0" is quantized before, so that student and float network differ there
NETWORKS: dict[str, Any] = {
    "bias": lambda: nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 24)),
    "no bias": lambda: nn.Sequential(nn.Linear(12, 16), nn.Sigmoid(), nn.Linear(16, 24, bias=False)),
    "norm": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
    ),
    "norm and bias": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
    ),
    "groups": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 16, 3, groups=2, bias=False), nn.BatchNorm2d(16)
    ),
}


def quantized_network(name: str, **fields: Any) -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """Float network, quantized one, and the data. The first layer has three inputs: blocks of its own."""
    model = randomized(NETWORKS[name]())
    data = vectors(5, batch=20) if "bias" in name and "norm" not in name else images(5, size=6, batch=4)
    first = LayerConfig(block_size=4 if isinstance(model[0], nn.Linear) else 1, codebook_size=4)
    result = bgd.quantize(model, data, fit_config(overrides=(("0", first),), **fields), progress=False)
    return model, result.model, data
