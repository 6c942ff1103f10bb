"""Exported programs go in, and what comes out can be exported again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

import bgd_plugin as bgd
from bgd_plugin.nn import PQModule
from tests.networks import SmallResNet, em, randomized


def _round_trip(model: nn.Module, x: Tensor, path: Path, config: bgd.BGDConfig) -> bgd.results.Quantized:
    program = torch.export.export(model, (x,))
    plan = bgd.plan(program, config)
    assert {layer.name for layer in plan.layers} == {layer.name for layer in bgd.plan(model, config).layers}
    result = bgd.quantize(program, [x], config, progress=False)
    assert result.report.compressed_bytes == plan.compressed_bytes == bgd.save(result.model, path)
    again = torch.export.export(result.model, (x,)).module()
    loaded = bgd.load(path, like=program)
    with torch.no_grad():
        answer = result.model(x)
        assert torch.equal(answer, loaded(x))
        assert torch.equal(answer, again(x))
        assert torch.equal(answer, bgd.materialize(result.model)(x))
        assert not torch.equal(answer, model(x))
    return result


@pytest.mark.parametrize("method", ["em", "full"])
def test_a_round_trip(method: Any, tmp_path: Path) -> None:
    result = _round_trip(randomized(SmallResNet()), torch.randn(4, 3, 8, 8), tmp_path / "net", em(method=method))
    assert [layer.name for layer in result.report.layers] == ["conv1", "conv2", "down", "fc"]


def test_the_program_stays_as_it_was() -> None:
    x = torch.randn(4, 3, 8, 8)
    program = torch.export.export(randomized(SmallResNet()), (x,))
    with torch.no_grad():
        before = program.module()(x)
        bgd.quantize(program, [x], em(), progress=False)
        assert torch.equal(program.module()(x), before)


class Tied(nn.Module):
    """A language model's ends: a table of embeddings is the weight of the head, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 64, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(self.embed(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("embedding", [None, bgd.LayerConfig(block_size=4, codebook_size=16)])
def test_a_tied_table_is_found_counted_and_stored_once(embedding: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied().eval(), torch.randint(0, 64, (8, 5))
    program, config = torch.export.export(model, (x,)), em(embedding=embedding)
    plans = [bgd.plan(network, config) for network in (model, program)]
    assert plans[0].original_bytes == plans[1].original_bytes
    assert abs(plans[0].compressed_bytes - plans[1].compressed_bytes) < 200
    assert [layer.name for layer in plans[1].layers] == ["a", "b", *([] if embedding is None else ["head"])]
    result = bgd.quantize(program, [x], config, progress=False)
    assert bgd.save(result.model, tmp_path / "net") == result.report.compressed_bytes == plans[1].compressed_bytes
    loaded = bgd.load(tmp_path / "net", like=program)
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
        assert torch.equal(torch.export.export(result.model, (x,)).module()(x), result.model(x))
    if embedding is not None:
        tables = [m for m in result.model.modules() if isinstance(m, PQModule) and m.weight_shape == (64, 32)]
        assert len({id(table.codebook) for table in tables}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "vit_b_16"])
def test_round_trips_of_torchvision_models(name: str, tmp_path: Path) -> None:
    size = {"image_size": 32} if name == "vit_b_16" else {}
    model = models.get_model(name, weights=None, **size).eval()
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # zeros at first
    _round_trip(model, torch.randn(2, 3, 32, 32), tmp_path / "net", em(em_iterations=1))
