"""A small network, images, and how a command is run and fails."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

from bgd_plugin.cli.app import app

__all__ = ["NET", "RUNNER", "SMALL", "Net", "fails", "image", "net", "number"]


RUNNER = CliRunner()


NET = f"{__name__}:net"


SMALL = ["--size", "8", "--resize", "8", "--batch-size", "4"]


class Net(nn.Module):
    """A stem that stays float, and two layers that are quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.conv = nn.Conv2d(8, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.norm(self.conv(torch.relu(self.stem(x))))).mean((2, 3)))


def net() -> nn.Module:
    """The same network at each call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Net()


def number() -> int:
    """No network."""
    return 3


def image(path: Path, seed: int, size: tuple[int, int] = (12, 9)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = torch.randint(0, 256, (*size, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    Image.fromarray(values.numpy()).save(path)


def fails(arguments: list[str], *words: str) -> None:
    done = RUNNER.invoke(app, arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith("bgd-plugin: ")
    assert "Traceback" not in done.output
    for word in words:
        assert word in done.stderr
