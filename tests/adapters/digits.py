"""Networks trained for seconds on scikit-learn's digits: what an adapter must compress exactly as the core does."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import SmallResNet

__all__ = ["DigitsResNet", "accuracy", "digits", "trained_on_digits"]


class _Block(nn.Module):
    """A basic block, by torchvision's names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class DigitsResNet(nn.Module):
    """A ResNet-18, layer by layer and by its names, an eighth as wide and with a stem for images of 8 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(_Block(8, 8, 1), _Block(8, 8, 1))
        self.layer2 = nn.Sequential(_Block(8, 16, 2), _Block(16, 16, 1))
        self.layer3 = nn.Sequential(_Block(16, 32, 2), _Block(32, 32, 1))
        self.layer4 = nn.Sequential(_Block(32, 64, 2), _Block(64, 64, 1))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))


def _small() -> nn.Module:
    return SmallResNet(classes=10)


@functools.cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """1,500 images `[n, 3, 8, 8]` to learn from with their labels, and the rest to judge by."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).div(16).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


@functools.cache
def _trained(make: Callable[[], nn.Module]) -> nn.Module:
    images, labels, _, _ = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
        for _ in range(12):
            for batch in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(_logits(model(images[batch])), labels[batch]).backward()
                optimizer.step()
    return model.eval()


def trained_on_digits(make: Callable[[], nn.Module] = _small) -> nn.Module:
    """The network that `make` builds, trained; a new copy of what is trained once in a session."""
    return copy.deepcopy(_trained(make))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The share of the judging images that a network gets right."""
    _, _, images, labels = digits()
    return float((_logits(model(images)).argmax(1) == labels).float().mean())
