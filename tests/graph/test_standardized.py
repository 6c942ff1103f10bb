"""Layers that compute their weight in `forward`: folded and quantized, on both ways of fitting."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.graph import fold_parametrizations_
from tests.networks import images

FINE = LayerConfig(block_size=1, codebook_size=256)
CONFIG = BGDConfig(
    conv=FINE, pointwise_conv=FINE, linear=FINE, first_layer=FINE, float_storage="float32", max_divergence=None
)


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (variance + 1e-5).sqrt(), self.bias, self.stride, self.padding)


class Scaled(nn.Conv2d):
    """With a gain of its own, by batch norm of the weight, as NFNets have it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=(self.gain * 0.3).view(-1), training=True, momentum=0.0)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Centred(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean((1, 2, 3), keepdim=True), bias)


class SamePadded(nn.Conv2d):
    """Pads as TensorFlow does, by the size of its input."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for size, kernel, stride in zip(x.shape[2:], self.kernel_size, self.stride, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
            pads = [total // 2, total - total // 2, *pads]
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(F.pad(x, pads), weight, self.bias, self.stride)


class Bounded(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.tanh(self.weight), self.bias, self.stride, self.padding)


class OfItsInput(nn.Conv2d):
    """Its weight depends on its input: no ordinary layer stands for it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean().sigmoid(), self.bias, self.stride, self.padding)


class Doubled(nn.Conv2d):
    """Does something with the result, too."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.conv2d(x, self.weight - self.weight.mean(), self.bias, self.stride, self.padding)


FOLDED: dict[str, Callable[..., nn.Conv2d]] = {
    kind.__name__: kind for kind in (Standardized, Scaled, Centred, SamePadded, Bounded)
}
OTHERS: dict[str, Callable[..., nn.Conv2d]] = {kind.__name__: kind for kind in (OfItsInput, Doubled)}


class Net(nn.Module):
    def __init__(self, kind: Callable[..., nn.Conv2d], branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), kind(16, 24, 3, padding=1), kind(24, 24, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c(torch.relu(self.b(torch.relu(self.a(x)))))
        return -y if self.branches and y.sum() > 1e9 else y


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("name", [*FOLDED, *OTHERS])
def test_the_answers_are_right_and_reload(name: str, branches: bool, tmp_path: Path) -> None:
    kind = {**FOLDED, **OTHERS}[name]
    model, data = Net(kind, branches).eval(), images(size=12)
    result = bgd.quantize(model, data, CONFIG, progress=False)
    names = {layer.name for layer in result.report.layers}
    assert names == ({"a", "b", "c"} if name in FOLDED else {"a"})
    skipped = {layer.name for layer in result.report.skipped if not layer.name.endswith("gain")}
    assert skipped == {"b", "c"} - names
    with torch.no_grad():
        wanted = model(data[0])
        assert (result.model(data[0]) - wanted).norm() < 0.06 * wanted.norm()
        bgd.save(result.model, tmp_path / "net")
        like = Net(kind, branches).eval()
        assert torch.equal(bgd.load(tmp_path / "net", like=like)(data[0]), result.model(data[0]))


@pytest.mark.parametrize("name", FOLDED)
def test_folding_changes_no_answer_and_no_weight_of_the_original(name: str) -> None:
    model, x = Net(FOLDED[name], branches=False).eval(), images(size=12)[0]
    wanted, held = model(x), model.b.weight.detach().clone()
    original = model.b
    assert fold_parametrizations_(model) == {"b": name, "c": name}
    assert type(model.b) is nn.Conv2d
    assert torch.equal(model(x), wanted)
    assert torch.equal(original.weight, held)
