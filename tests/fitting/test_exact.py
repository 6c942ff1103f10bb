"""As many codewords as distinct blocks: nothing is lost but what the codebook's storage type rounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.fitting.exact import exact_fit
from bgd_plugin.nn import storable
from bgd_plugin.planning.types import PlannedLayer
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


def _planned(**fields: Any) -> PlannedLayer:
    common = {"name": "a", "target": "a", "kind": "linear", "family": "linear", "calls": ("a",)}
    return PlannedLayer(**(common | {"weight_shape": (6, 8), "block_size": 4, "codebook_size": 8} | fields))


@pytest.mark.parametrize("storage", ["int8", "float16"])
@pytest.mark.parametrize("count", [7, 8, 9])
def test_up_to_as_many_blocks_as_codewords_are_kept_rounded_to_their_storage(count: int, storage: str) -> None:
    """Eight codewords; the blocks differ in their first weights already."""
    words = torch.randn(count, 4, generator=torch.Generator().manual_seed(2))
    weight = words[torch.arange(12) % count].reshape(6, 8)
    fit = exact_fit(weight, _planned(codebook_storage=storage))
    assert (fit is None) == (count > 8)
    if fit is not None:
        decoded = fit.codebook[fit.codes].reshape(6, 8)
        torch.testing.assert_close(decoded, weight, rtol=0, atol=0.02)
        assert torch.equal(fit.codebook, storable(fit.codebook, storage)) and not torch.equal(decoded, weight)  # type: ignore[arg-type]
        assert fit.codes.shape == (6, 2)
        assert fit.warnings == (("1 of 8 codewords are not used",) if count == 7 else ())


def test_blocks_that_differ_in_later_weights_are_different() -> None:
    weight = torch.arange(48.0).reshape(6, 8)
    weight[:, ::4] = 1.0
    assert exact_fit(weight, _planned()) is None


def test_codes_that_are_entropy_coded_walk_through_a_trellis_and_are_never_exact() -> None:
    assert exact_fit(torch.ones(6, 8), _planned(codes="entropy", block_size=1, size_bytes=99)) is None
