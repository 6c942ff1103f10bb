"""Frozen norms: what a batch norm does in evaluation mode, with half of its numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.errors import CheckpointError
from bgd_plugin.nn import FrozenNorm, freeze_norms_
from tests.networks import SmallResNet, em, images, randomized, same_outputs


@pytest.mark.parametrize(("norm", "shape"), [(nn.BatchNorm1d, (4, 6)), (nn.BatchNorm2d, (4, 6, 3, 2))])
@pytest.mark.parametrize("affine", [True, False])
def test_outputs_are_those_of_the_batch_norm(norm: Any, shape: tuple[int, ...], affine: bool) -> None:
    module = norm(6, affine=affine).eval()
    module = randomized(module) if affine else module
    module.running_mean.uniform_(-1, 1)
    module.running_var.uniform_(0.1, 3)
    x = torch.randn(shape)
    frozen = FrozenNorm.of(module)
    torch.testing.assert_close(frozen(x), module(x))
    torch.testing.assert_close(frozen.train()(x), module(x))


def test_a_shared_norm_stays_shared() -> None:
    norm = nn.BatchNorm2d(3)
    model = nn.ModuleDict({"a": norm, "b": norm, "c": nn.BatchNorm2d(3, track_running_stats=False)})
    assert freeze_norms_(model) == ["a", "b"]
    assert model["a"] is model["b"]
    assert isinstance(model["c"], nn.BatchNorm2d)


def test_a_network_with_frozen_norms_is_smaller_and_reloads(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(2)
    sizes = []
    for freeze in (False, True):
        config = em(freeze_norms=freeze, float_storage="float16", codebook_storage="int8", weight_storage="int8")
        result = bgd.quantize(model, data, config, progress=False)
        size = bgd.save(result.model, tmp_path / "net")
        assert size == result.report.compressed_bytes == bgd.plan(model, config).compressed_bytes
        with torch.device("meta"):
            like = SmallResNet()
        loaded = bgd.load(tmp_path / "net", like=like).eval()
        assert same_outputs(loaded, result.model, data)
        sizes.append(size)
    channels = sum(m.num_features for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert sizes[0] - sizes[1] >= 4 * channels


def test_a_frozen_norm_without_its_batch_norm_is_named(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(2)
    result = bgd.quantize(model, data, em(freeze_norms=True), progress=False)
    bgd.save(result.model, tmp_path / "net")
    other = SmallResNet()
    other.bn2 = nn.Identity()
    with pytest.raises(CheckpointError, match="a frozen norm 'bn2' is in the file; the network has no such"):
        bgd.load(tmp_path / "net", like=other)


def test_a_file_with_frozen_norms_fits_the_network_made_dense(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 1)).eval()
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    network = bgd.quantize(model, data, bgd.BGDConfig(freeze_norms=True, max_divergence=None), progress=False).model
    assert isinstance(network[1], FrozenNorm)
    bgd.save(network, tmp_path / "net.safetensors")
    dense = bgd.materialize(copy.deepcopy(network))
    held = dense[1].weight.detach().clone()
    with torch.no_grad():
        dense[1].weight.mul_(2)  # what `like` holds is not used, and not changed
    loaded = bgd.load(tmp_path / "net.safetensors", like=dense)
    assert torch.equal(loaded(data[0]), network(data[0]))
    assert torch.equal(dense[1].weight, 2 * held)
