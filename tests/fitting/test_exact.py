"""As many codewords as distinct blocks: nothing is lost but what the codebook's storage type rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from tests.networks import SmallResNet, images, randomized, vectors


def _config(setting: LayerConfig, method: Any) -> BGDConfig:
    return BGDConfig(
        method=method,
        conv=setting,
        pointwise_conv=setting,
        linear=setting,
        first_layer=setting,
        codebook_storage="float16",
        weight_storage="float32",
        float_storage="float32",
    )


@pytest.mark.parametrize("method", ["em", "full"])
@pytest.mark.parametrize("branches", [False, True])
def test_single_weights_with_a_codeword_each_are_exact(method: Any, branches: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = SmallResNet()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.body(x)
            return -y if branches and y.sum() > 1e9 else y

    model, data = randomized(Net()), images()
    result = bgd.quantize(model, data, _config(LayerConfig(block_size=1, codebook_size=4096), method), progress=False)
    wanted = {name: p.half().float() for name, p in model.named_parameters() if p.ndim > 1}
    for layer in result.report.layers:
        assert torch.equal(result.model.get_submodule(layer.name).weight, wanted[f"{layer.name}.weight"])
    assert len(result.report.layers) == 5
    with torch.no_grad():
        exact, found = model(data[0]), result.model(data[0])
    assert float((found - exact).norm() / exact.norm()) < 1e-3


@pytest.mark.parametrize("method", ["em", "full"])
def test_weights_of_few_values_are_exact_in_larger_blocks(method: Any) -> None:
    """Ternary weights: 81 different blocks of four at most."""
    model = nn.Sequential(nn.Linear(12, 200), nn.ReLU(), nn.Linear(200, 200)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(layer.weight.sign() * (layer.weight.abs() > layer.weight.abs().median()))
    setting = LayerConfig(block_size=4, codebook_size=128)
    result = bgd.quantize(model, vectors(), _config(setting, method), progress=False)
    for layer, name in ((model[0], "0"), (model[2], "2")):
        assert torch.equal(result.model.get_submodule(name).weight, layer.weight)


def test_a_codebook_is_no_larger_than_its_layer_has_weights() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 100))
    sizes = {
        d: [
            x.codebook_size
            for x in bgd.plan(model, _config(LayerConfig(block_size=d, codebook_size=4096), "em")).layers
        ]
        for d in (1, 2)
    }
    assert sizes == {1: [256, 2048], 2: [16, 128]}
