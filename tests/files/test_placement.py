"""Quantized layers in networks of the user's own class."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig, integration
from bgd_plugin.errors import CheckpointError
from tests.networks import FunctionalNet, PlainNet, SmallResNet, images, randomized, same_outputs

SMALL = BGDConfig(conv=LayerConfig(block_size=9, codebook_size=16), max_divergence=None)


@pytest.mark.parametrize("network", [SmallResNet, FunctionalNet])
def test_transplanted_computes_what_the_result_does(network: type[nn.Module]) -> None:
    model, data = randomized(network()), images()
    result = bgd.quantize(model, data, SMALL, progress=False).model
    assert isinstance(result, network)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = integration.transplanted(model, result)
    assert found.state_dict().keys() == result.state_dict().keys()
    assert same_outputs(found, result, data)
    assert not integration.placement_of(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    integration.transplant_(model, result)
    assert same_outputs(model, result, data)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_room_for_a_state_dict(device: str) -> None:
    model, data = randomized(SmallResNet()), images()
    result = integration.transplanted(model, bgd.quantize(model, data, SMALL, progress=False).model)
    state = result.state_dict()
    assert integration.placement_in(state) == integration.placement_of(result)
    with torch.device(device):
        fresh = SmallResNet().eval()
    integration.make_room_(fresh, integration.placement_in(state))
    fresh.load_state_dict(state, assign=True)
    assert same_outputs(fresh, result, data)


def test_room_is_made_only_where_it_fits() -> None:
    model = PlainNet()
    with pytest.raises(
        CheckpointError, match=r"(?s)'nothing': the network has no.*'2': 32 weights per row, blocks of 5"
    ):
        integration.make_room_(model, {"nothing": (4, 16), "2": (5, 16), "4": (4, 16)})
    assert not integration.placement_of(model)
    with pytest.raises(CheckpointError, match="'2': found 4, expected its block size and codebook size"):
        integration.make_room_(model, {"2": 4})  # type: ignore[dict-item]
    integration.make_room_(model, {"2": (4, 16)})
    with pytest.raises(CheckpointError, match="'2': the network has no such convolution or linear layer that is still"):
        integration.make_room_(model, {"2": (4, 16)})


def test_a_float_state_has_no_placement() -> None:
    assert integration.placement_in(PlainNet().state_dict()) == {}


def test_layers_in_a_network_whatever_the_settings() -> None:
    families, reasons = integration.layers_in(nn.Sequential(*SmallResNet().children(), nn.Bilinear(4, 4, 4)))
    assert set(families.values()) == {"conv", "pointwise_conv", "linear"}
    assert len(families) == 5
    assert reasons
