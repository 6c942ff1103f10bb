"""Networks by name, and their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.cli.common import NET, fails, net


def test_weights_come_from_files(tmp_path: Path, flat: Path, file: Path) -> None:
    import safetensors.torch

    from bgd_plugin.cli.models import named_model

    state = {k: v + 1 for k, v in net().state_dict().items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "net.pth")
    safetensors.torch.save_file(state, tmp_path / "plain.safetensors")
    for name in ("net.pth", "plain.safetensors"):
        found = named_model(NET, str(tmp_path / name)).model
        assert torch.equal(found.state_dict()["fc.weight"], state["fc.weight"])
        assert not found.training


def test_random_weights_are_the_same_at_each_call() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from bgd_plugin.cli.models import named_model

    before = torch.get_rng_state()
    one, two = (named_model("torchvision:squeezenet1_1") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
    assert not one.has_weights
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_that_are_no_state_dict(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    fails(["plan", NET, "--weights", str(tmp_path / "module.pth")], "not a plain state dict")
    fails(["plan", NET, "--weights", str(tmp_path / "text.pth")], "not a plain state dict")
    fails(["plan", NET, "--weights", str(tmp_path / "other.pth")], "does not fit the network", "stem.weight")
    fails(["plan", NET, "--weights", str(tmp_path / "none.pth")], "file not found")


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("resnet18", "give torchvision:NAME"),
        ("no_such_package:net", "No module named 'no_such_package'"),
        ("torch:no_such_net", "torch has no 'no_such_net'"),
        ("tests.cli.common:number", "is a int"),
    ],
)
def test_names_that_lead_nowhere(name: str, word: str) -> None:
    fails(["plan", name], word)


def test_a_torchvision_name_that_is_nearly_right() -> None:
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    fails(["plan", "torchvision:resnet19"], "no model 'resnet19'", "resnet18")
