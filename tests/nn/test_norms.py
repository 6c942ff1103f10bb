"""What counts as a batch norm: what computes as one, and nothing that does more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.nn import FrozenNorm, freeze_norms_, is_batchnorm, normalizes
from tests.networks import images


class _Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(super().forward(x))


class _Gated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(super().forward(x))


class _Same(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)


class _Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d, and, with `gate`, not quite."""

    def __init__(self, channels: int, gate: bool = False) -> None:
        super().__init__()
        self.eps, self.gate = 1e-5, gate
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Any) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        y = x * scale.reshape(-1, 1, 1) + (self.bias - self.running_mean * scale).reshape(-1, 1, 1)
        return y * torch.tanh(x) if self.gate else y


def _patched(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    forward = norm.forward
    norm.forward = lambda x: forward(x) + x  # type: ignore[method-assign,misc,assignment]
    return norm


def _changed_before(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    return norm


def _changed_after(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.register_forward_hook(lambda module, args, output: output * 3)
    return norm


# what it is, whether it begins with a norm, whether it is one
NORMS: dict[str, tuple[Callable[[int], nn.Module], bool, bool]] = {
    "torch": (nn.BatchNorm2d, True, True),
    "synchronized": (nn.SyncBatchNorm, True, True),
    "same": (_Same, True, True),
    "frozen": (_Frozen, True, True),
    "activated": (_Activated, True, False),
    "gated": (_Gated, False, False),
    "frozen and gated": (lambda n: _Frozen(n, gate=True), False, False),
    "patched": (_patched, False, False),
    "hook before": (_changed_before, False, True),
    "hook after": (_changed_after, True, True),
}


def _norm(name: str, channels: int = 16) -> nn.Module:
    norm: Any = NORMS[name][0](channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if isinstance(norm.weight, nn.Parameter):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    result: nn.Module = norm.eval()
    return result


@pytest.mark.parametrize("name", NORMS)
def test_what_a_norm_computes_is_seen(name: str) -> None:
    norm = _norm(name)
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    assert (normalizes(norm), is_batchnorm(norm)) == NORMS[name][1:]
    assert all(torch.equal(value, before[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", NORMS)
def test_frozen_norms_compute_as_before(name: str) -> None:
    model, x = nn.Sequential(_norm(name, 3)).eval(), images()[0]
    wanted = model(x)
    frozen = freeze_norms_(model)
    assert isinstance(model[0], FrozenNorm) == bool(frozen)
    assert torch.allclose(model(x), wanted, atol=1e-5)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_a_network_with_such_a_norm_is_right(name: str, branches: bool) -> None:
    """On both ways of fitting, with everything on that may touch a norm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Conv2d(3, 16, 3), _norm(name), nn.Conv2d(16, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.a(x))
            return self.b(-y if branches and y.sum() > 1e9 else y)

    fine = LayerConfig(block_size=1, codebook_size=256)
    config = BGDConfig(
        conv=fine,
        pointwise_conv=fine,
        first_layer=fine,
        linear=fine,
        float_storage="float32",
        freeze_norms=True,
        max_divergence=None,
    )
    model, data = Net().eval(), images(size=12)
    found = bgd.quantize(model, data, config, progress=False).model
    with torch.no_grad():
        wanted = model(data[0])
        assert (found(data[0]) - wanted).norm() < 0.05 * wanted.norm()
