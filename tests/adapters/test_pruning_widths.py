"""A file of a narrowed network is loaded into the dense architecture: layers of every kind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import LayerConfig
from bgd_plugin.errors import CheckpointError
from bgd_plugin_adapters.pruning import narrowed
from tests.networks import em, images, vectors


class Scaled(nn.Module):
    """A factor for each channel, as a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Attending(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first = nn.Linear(12, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.last = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)[:, None]
        return self.last(self.attention(x, x, x, need_weights=False)[0].mean(1))


def upsampling(width: int, affine: bool = True) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3),
        nn.InstanceNorm2d(width, affine=affine, track_running_stats=affine),
        nn.PReLU(width),
        nn.ConvTranspose2d(width, width, 2, stride=2),
        nn.GroupNorm(4, width),
        Scaled(width),
        nn.ConvTranspose2d(width, width, 3, groups=width),
        nn.BatchNorm2d(width),
        nn.Conv2d(width, 5, 1),
    )


NARROWED: dict[str, tuple[Callable[[int], nn.Module], int, int, Callable[[], list[Tensor]]]] = {
    "transposed, instance norm, PReLU, parameter": (upsampling, 32, 16, lambda: images(size=10)),
    "attention with fewer heads": (lambda width: Attending(width, width // 8), 32, 16, vectors),
    "embedding": (
        lambda width: nn.Sequential(nn.Embedding(40, width), nn.Linear(width, 32), nn.Linear(32, 4)),
        24,
        16,
        lambda: [torch.arange(12).reshape(3, 4)],
    ),
}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("case", NARROWED)
def test_layers_of_every_kind_are_narrowed(case: str, freeze: bool, tmp_path: Path) -> None:
    build, dense, narrow_width, data = NARROWED[case]
    torch.manual_seed(0)
    model = build(narrow_width).eval()
    result = bgd.quantize(model, data(), em(freeze_norms=freeze), progress=False)
    bgd.save(result.model, tmp_path / "net.safetensors")
    wide = build(dense).eval()
    like = narrowed(wide, tmp_path / "net.safetensors")
    assert all(parameter.is_meta for parameter in like.parameters())
    assert {k: v.shape for k, v in like.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert repr(like) == repr(model)
    net = bgd.load(tmp_path / "net.safetensors", like=like)
    with torch.no_grad():
        assert torch.equal(net(data()[0]), result.model(data()[0]))


def beside_a_quantized_layer(module: nn.Module, path: Path) -> nn.Module:
    """A network with a module of the test, saved; what a dense one would hold is for the caller."""
    network = nn.Sequential(nn.Linear(32, 32), module, nn.Linear(32, 4)).eval()
    config = bgd.BGDConfig(first_layer=LayerConfig(block_size=4, codebook_size=16), max_divergence=None)
    bgd.save(bgd.quantize_weights(network, config).model, path)
    return network


@pytest.mark.parametrize(
    ("saved", "dense", "message"),
    [
        (nn.LSTM(8, 16), nn.LSTM(8, 32), "one tensor does not determine the widths of a LSTM"),
        (nn.GroupNorm(3, 12), nn.GroupNorm(8, 16), "8 groups do not divide 12 channels"),
        (nn.Conv2d(8, 12, 3, groups=4), nn.Conv2d(16, 24, 3, groups=8), "8 groups do not divide its channels"),
    ],
    ids=["recurrent", "group norm", "groups"],
)
def test_a_width_that_the_file_does_not_tell_is_an_error_that_names_like(
    saved: nn.Module, dense: nn.Module, message: str, tmp_path: Path
) -> None:
    network: Any = beside_a_quantized_layer(saved, tmp_path / "net.safetensors")
    network[1] = dense
    with pytest.raises(CheckpointError, match=rf"'1': {message}; build .* give it to bgd_plugin\.load as like="):
        narrowed(network, tmp_path / "net.safetensors")
