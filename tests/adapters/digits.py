"""A network trained for seconds on scikit-learn's digits: what an adapter must compress exactly as the core does."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.networks import SmallResNet

__all__ = ["accuracy", "digits", "trained_on_digits"]


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
def _trained() -> nn.Module:
    images, labels, _, _ = digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SmallResNet(classes=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(8):
            for batch in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                F.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
    return model.eval()


def trained_on_digits() -> nn.Module:
    """The trained network, a new copy."""
    model = SmallResNet(classes=10).eval()
    model.load_state_dict(_trained().state_dict())
    return model


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """The share of the judging images that a network gets right."""
    _, _, images, labels = digits()
    output = model(images)
    logits = output if isinstance(output, Tensor) else output.logits
    return float((logits.argmax(1) == labels).float().mean())
