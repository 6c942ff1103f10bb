"""codes="entropy": the budget is kept, the file holds streams, and everything else sees ordinary layers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig, ReconstructionConfig
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.inspection import inspected
from bgd_plugin.files.save import read_file
from bgd_plugin.nn import FrozenNorm, PQModule
from bgd_plugin.quantization import quality
from tests.networks import images, randomized, same_outputs

# One worker of pytest-xdist runs them, so that the network is quantized once.
pytestmark = pytest.mark.xdist_group("entropy")

DATA = images(8, size=8)
BUDGET = BGDConfig(codes="entropy", target_ratio=7.0, freeze_norms=True, rounds=1)


class Net(nn.Module):
    """Pointwise, depthwise, spatial, grouped and transposed convolutions, norms, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand, self.norm1 = nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.depthwise, self.norm2 = nn.Conv2d(16, 16, 3, 2, 1, groups=16, bias=False), nn.BatchNorm2d(16)
        self.spatial, self.norm3 = nn.Conv2d(16, 40, 3, padding=1, bias=False), nn.BatchNorm2d(40)
        self.grouped = nn.Conv2d(40, 32, 3, groups=2)
        self.up = nn.ConvTranspose2d(32, 32, 2, 2)
        self.fc = nn.Linear(32, 30)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.expand(torch.relu(self.stem(x)))))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = torch.relu(self.norm3(self.spatial(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        result: Tensor = self.fc(x.mean((2, 3)))
        return result


class Branching(Net):
    """The same, but what it runs depends on values, so that it has no graph."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if float(x.abs().max()) > 0 else x.new_zeros(len(x), 30)


class Maps(Net):
    """The same without pooling: no logits come out."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.expand(torch.relu(self.stem(x)))))
        x = torch.relu(self.norm2(self.depthwise(x)))
        x = torch.relu(self.norm3(self.spatial(x)))
        x = torch.relu(self.up(torch.relu(self.grouped(x))))
        result: Tensor = self.fc(x.movedim(1, 3))
        return result


def _net(kind: type[Net] = Net) -> Net:
    """Its weights are large enough that answers depend on what goes in."""
    torch.manual_seed(0)
    net: Net = randomized(kind())
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight)
    return net


@pytest.fixture(scope="module")
def result() -> Any:
    return bgd.quantize(_net(), DATA, BUDGET, progress=False)


def test_the_file_is_within_the_budget_and_uses_it(result: Any, tmp_path: Path) -> None:
    size = bgd.save(result.model, tmp_path / "net")
    assert size == result.report.compressed_bytes
    assert 0.93 * result.report.original_bytes / 7 < size <= result.report.original_bytes / 7
    assert inspected(tmp_path / "net")["format"] == 3


def test_the_report_has_the_bytes_of_file_and_memory(result: Any, tmp_path: Path) -> None:
    bgd.save(result.model, tmp_path / "net")
    in_file = {layer["name"]: layer for layer in inspected(tmp_path / "net")["layers"]}
    streams = [layer for layer in result.report.layers if layer.memory_bytes > 1.5 * layer.compressed_bytes]
    assert len(streams) >= 3
    for layer in streams:
        module: Any = result.model.get_submodule(layer.name)
        found = in_file[layer.name]
        scale = 4
        assert abs(found["codes_bytes"] + found["codebook_bytes"] + scale - layer.compressed_bytes) < 12
        assert layer.codebook_size == module.codebook_size
        assert layer.memory_bytes == module.codes.numel() + 4 * module.codebook.numel()
        assert layer.bits_per_weight == 8 * layer.compressed_bytes / module.weight.numel()


def test_the_network_comes_back_and_is_an_ordinary_one(result: Any, tmp_path: Path) -> None:
    bgd.save(result.model, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=_net())
    assert same_outputs(result.model, loaded, DATA[:1])
    dense = bgd.materialize(result.model)
    assert not any(isinstance(module, PQModule) for module in dense.modules())
    assert same_outputs(result.model, dense, DATA[:1])
    assert type(result.model) is Net


def test_it_answers_better_than_blocks_of_as_many_bytes() -> None:
    lost, other = (
        _error(bgd.quantize(_net(Maps), DATA, dataclasses.replace(BUDGET, codes=codes), progress=False).model)
        for codes in ("entropy", "blocks")
    )
    assert lost < 0.5 * other


def _error(model: nn.Module) -> float:
    with torch.no_grad():
        pairs = [(model(x), _net(Maps)(x)) for x in images(3, size=8, seed=5)]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_depthwise_weights_are_small_integers_and_norms_keep_half_precision(result: Any, tmp_path: Path) -> None:
    weight = result.model.depthwise.weight.detach().flatten()
    step = weight.abs()[weight != 0].min()
    assert float((weight / step - (weight / step).round()).abs().max()) == 0
    assert float((weight / step).abs().max()) <= 127
    norms = [module for module in result.model.modules() if isinstance(module, FrozenNorm)]
    assert len(norms) == 3
    assert all(torch.equal(value.half().to(value), value) for norm in norms for value in norm.parameters())
    bgd.save(result.model, tmp_path / "net")
    others = {other["name"]: other["bytes"] for other in inspected(tmp_path / "net")["others"]}
    assert others["depthwise.weight"] <= 16 * 9 + 1


@pytest.mark.parametrize(
    "stage", [{"finetuning": FinetuningConfig(steps=2)}, {"reconstruction": ReconstructionConfig(steps=2)}]
)
def test_training_leaves_small_integers_as_they_are(stage: dict[str, Any], tmp_path: Path) -> None:
    """Off their grid they would take two bytes each, and other layers would be made coarser to keep to the budget."""
    found = bgd.quantize(_net(), DATA, dataclasses.replace(BUDGET, **stage), progress=False)
    weight = found.model.depthwise.weight.detach()
    assert torch.equal(16 * weight, (16 * weight).round()) and float(weight.abs().max()) <= 1
    size = bgd.save(found.model, tmp_path / "net")
    assert size <= found.report.original_bytes / 7
    assert not any("fewer bytes" in note for note in found.report.notes)


def test_a_stopped_run_ends_in_the_same_bytes(tmp_path: Path, result: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bgd_plugin.quantization.resume import Run

    store = Run.store

    def stopping(self: Run, index: int, *stored: Any) -> None:
        store(self, index, *stored)
        if index == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "store", stopping)
    with pytest.raises(KeyboardInterrupt):
        bgd.quantize(_net(), DATA, BUDGET, progress=False, checkpoint=tmp_path / "run")
    monkeypatch.undo()
    again = bgd.quantize(_net(), DATA, BUDGET, progress=False, checkpoint=tmp_path / "run")
    for name, model in (("one", result.model), ("other", again.model)):
        bgd.save(model, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize("fields", [{}, {"method": "em"}])
def test_a_network_without_a_graph(fields: dict[str, Any], tmp_path: Path) -> None:
    config = dataclasses.replace(BUDGET, **fields)
    found = bgd.quantize(_net(Branching), DATA, config, progress=False)
    size = bgd.save(found.model, tmp_path / "net")
    assert size == found.report.compressed_bytes <= found.report.original_bytes / 7
    assert any(layer.memory_bytes > 1.5 * layer.compressed_bytes for layer in found.report.layers)
    assert same_outputs(found.model, bgd.load(tmp_path / "net", like=_net(Branching)), DATA[:1])


def test_without_data(tmp_path: Path) -> None:
    found = bgd.quantize_weights(_net(), BUDGET)
    size = bgd.save(found.model, tmp_path / "net")
    assert size == found.report.compressed_bytes <= found.report.original_bytes / 7
    assert read_file(tmp_path / "net")[1]["format"] == 3


def test_a_bound_on_the_divergence_takes_fewer_bytes_than_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its first pass: what comes out of a further one is another matter."""
    monkeypatch.setattr(quality, "_is_good_enough", lambda *_, **__: True)
    reports = [
        bgd.quantize(
            _net(Maps), DATA, BGDConfig(codes=codes, max_divergence=0.02, freeze_norms=True, rounds=1), progress=False
        ).report
        for codes in ("entropy", "blocks")
    ]
    assert reports[0].answers is not None
    assert reports[0].answers.divergence <= 0.02
    assert reports[0].compressed_bytes < 0.97 * reports[1].compressed_bytes


def test_plan_says_what_the_streams_may_take() -> None:
    plan = bgd.plan(_net(), BUDGET, DATA, progress=False)
    streams = [layer for layer in plan.layers if layer.codes == "entropy"]
    assert len(streams) >= 3
    assert all(layer.compressed_bytes == layer.size_bytes < layer.memory_bytes for layer in streams)
    assert plan.compressed_bytes <= plan.original_bytes / 7
    assert "entropy" in str(plan)


def test_layers_of_an_override_keep_their_blocks() -> None:
    config = dataclasses.replace(BUDGET, overrides=(("fc", bgd.LayerConfig(block_size=4, codebook_size=16)),))
    (fc,) = [layer for layer in bgd.plan(_net(), config).layers if layer.name == "fc"]
    assert (fc.codes, fc.block_size, fc.codebook_size) == ("blocks", 4, 16)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_ratio": None, "max_divergence": None}, "codes='entropy' has no fixed sizes: give target_bytes"),
        ({"preserve_zeros": True}, "entropy-coded codes have no masks"),
        ({"codes": "arithmetic"}, "codes='arithmetic': give 'blocks', 'trellis' or 'entropy'"),
    ],
)
def test_settings_that_do_not_suit_it_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BUDGET, **fields)
