"""Small networks and calibration data for the tests: big enough to have codebooks, small enough to take no time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bgd_plugin import BGDConfig

# Networks this small are slower on several threads, and very much slower where other work shares the cores.
torch.set_num_threads(1)

__all__ = [
    "ConvOfItsOwn",
    "FunctionalNet",
    "NormedBranch",
    "PlainNet",
    "SmallResNet",
    "TwiceNet",
    "em",
    "images",
    "randomized",
    "same_outputs",
    "vectors",
]


class SmallResNet(nn.Module):
    """A stem, a residual block with in-place operators and one shared ReLU, a head: what a ResNet is made of."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.down = nn.Conv2d(8, 16, 1, stride=2, bias=False)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.stem(x)))
        y = self.relu(self.bn2(self.conv1(x)))
        y = self.bn3(self.conv2(y))
        y += self.down(x)
        y = self.relu(y)
        return self.fc(y.mean((2, 3)))


class PlainNet(nn.Sequential):
    """Three linear layers, no batch norm."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__(nn.Linear(12, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, classes))


class NormedBranch(nn.Module):
    """A branch that ends in a norm, beside a skip that runs before it, and a norm behind the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.skip, self.branch = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1, bias=False)
        self.norm, self.last = nn.BatchNorm2d(6), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.skip(x))
        result: Tensor = self.last(x + self.norm(self.branch(x)))
        return result


class TwiceNet(nn.Module):
    """One layer that runs twice, and hangs under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 32)
        self.shared = nn.Linear(32, 32)
        self.alias = self.shared
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.shared(x))
        x = torch.tanh(self.alias(x))
        return self.last(x)


class ConvOfItsOwn(nn.Conv2d):
    """A convolution with a forward of its own, as in EfficientNet-Lite: padding as TensorFlow's "SAME"."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, [0, 1, 0, 1])
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class FunctionalNet(nn.Module):
    """Weights that are read as plain tensors: by a module's own forward, and by functions on bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.own = ConvOfItsOwn(8, 16, 3, stride=2)
        self.kernel = nn.Parameter(torch.randn(16, 8, 3, 3) * 0.2)
        self.matrix = nn.Parameter(torch.randn(24, 16) * 0.2)
        self.bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.own(self.stem(x)))
        x = torch.relu(F.conv2d(x, weight=self.kernel, padding="same", groups=2))
        return F.linear(x.mean((2, 3)), self.matrix, self.bias)


def randomized(model: Any, seed: int = 0) -> Any:
    """The model in evaluation mode, its batch norms with statistics that no narrow type holds, as after a training."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                tensor.data = torch.rand(tensor.shape, generator=generator) + low
            module.running_var = torch.rand(module.num_features, generator=generator) + 0.5
    return model.eval()


def images(batches: int = 3, size: int = 8, batch: int = 4, channels: int = 3, seed: int = 1) -> list[Tensor]:
    """Batches of random images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, channels, size, size, generator=generator) for _ in range(batches)]


def vectors(batches: int = 3, batch: int = 8, features: int = 12, seed: int = 1) -> list[Tensor]:
    """Batches of random vectors."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, features, generator=generator) for _ in range(batches)]


def em(**fields: Any) -> BGDConfig:
    """The paper's fit with few iterations, no training, batch norm as it is; fields change that."""
    storage = {"codebook_storage": "float16", "weight_storage": "float32", "float_storage": "float32"}
    plain = {"method": "em", "em_iterations": 8, "batchnorm": "keep", "kept_aside": 0.0}
    return BGDConfig(**(plain | storage | fields), max_divergence=None)


@torch.no_grad()
def same_outputs(one: nn.Module, other: nn.Module, batches: list[Tensor]) -> bool:
    """Whether two networks give the same bits."""
    return all(torch.equal(one(batch), other(batch)) for batch in batches)
