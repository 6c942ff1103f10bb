"""Networks and data of these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """A stem that stays float, a convolution with its batch norm, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.fc1 = nn.Linear(32, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x).relu())
        return self.fc2(self.fc1(self.norm(x).relu().mean((2, 3))).relu())


class Linears(nn.Module):
    """The three layers of neural-compressor's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(30, 50)
        self.fc2 = nn.Linear(50, 30)
        self.fc3 = nn.Linear(30, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(self.fc2(self.fc1(x)))


def conv_net() -> ConvNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return ConvNet().eval()


def linears() -> Linears:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Linears().eval()


def inputs(*shape: int, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(8, *shape, generator=generator) for _ in range(batches)]


IMAGES = inputs(3, 8, 8)
VECTORS = inputs(30)


def feed(batches: list[Tensor]) -> Callable[[Any], None]:
    """A `run_fn` over the batches."""

    def run_fn(model: Any) -> None:
        for batch in batches:
            model(batch)

    return run_fn


def kinds(model: nn.Module) -> dict[str, str]:
    """The type of each leaf by name."""
    return {name: type(m).__name__ for name, m in model.named_modules() if name and not list(m.children())}
