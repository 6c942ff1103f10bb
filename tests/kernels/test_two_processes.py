"""A saved network answers by the kernels of another process bit for bit as by those of the one that saved it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bgd_plugin as bgd
from bgd_plugin import kernels

ROOT = Path(__file__).parents[2]


def network() -> nn.Sequential:
    """Layers that the kernels compute in each of their ways, with batches of 1, 3 and 70."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Conv2d(32, 64, 1),
        nn.Flatten(),
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    ).eval()


def answers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Outputs of some batches, with and without `no_grad`."""
    found = {}
    for size in (1, 3, 70):
        x = torch.randn(size, 3, 6, 6, generator=torch.Generator().manual_seed(size))
        found[f"grad-{size}"] = model(x).detach()
        with torch.no_grad():
            found[f"no-grad-{size}"] = model(x)
    return found


def test_a_saved_network_answers_the_same_in_another_process(tmp_path: Path) -> None:
    assert kernels.enabled()
    config = bgd.BGDConfig(max_divergence=None)
    model = bgd.quantize(network(), [torch.randn(16, 3, 6, 6)], config, progress=False).model
    bgd.save(model, tmp_path / "net.safetensors")
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'adapters')!r}]\n"
        "import bgd_plugin as bgd\n"
        "from safetensors.torch import save_file\n"
        "from tests.kernels.test_two_processes import answers, network\n"
        "save_file(answers(bgd.load('net.safetensors', like=network())), 'answers.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    save_file(answers(model), tmp_path / "mine.safetensors")
    mine, theirs = load_file(tmp_path / "mine.safetensors"), load_file(tmp_path / "answers.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(torch.equal(mine[f"grad-{size}"], mine[f"no-grad-{size}"]) for size in (1, 3, 70))
    with kernels.disabled():
        assert any(not torch.equal(value, mine[name]) for name, value in answers(model).items())
