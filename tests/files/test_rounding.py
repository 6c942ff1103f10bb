"""What stays float is rounded to half precision: in memory, in the file, and in the plan alike."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import bgd_plugin as bgd
from bgd_plugin.files.rounding import round_floats_
from tests.networks import SmallResNet, em, images, randomized, vectors


def test_plan_report_and_file_agree_and_shrink(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(3)
    sizes = {}
    for storage in ("float16", "float32"):
        config = em(batchnorm="matched", float_storage=storage)
        result = bgd.quantize(model, data, config, progress=False)
        sizes[storage] = bgd.save(result.model, tmp_path / storage)
        assert sizes[storage] == result.report.compressed_bytes == (tmp_path / storage).stat().st_size
        assert bgd.plan(model, config).compressed_bytes == sizes[storage]
    floats = sum(t.numel() for k, t in model.state_dict().items() if "bn" in k or "stem" in k or "bias" in k)
    assert sizes["float32"] - sizes["float16"] > 1.5 * floats


def test_meta_plan_agrees() -> None:
    """But for the counters of batch norms, whose values a meta tensor does not tell."""
    config = em(float_storage="float16")
    with torch.device("meta"):
        meta = SmallResNet()
    counters = 7 * sum(isinstance(m, nn.BatchNorm2d) for m in meta.modules())
    real = bgd.plan(randomized(SmallResNet()), config).compressed_bytes
    assert real <= bgd.plan(meta, config).compressed_bytes <= real + counters + 16


def test_reload_is_equal(tmp_path: Path) -> None:
    model, data = randomized(SmallResNet()).eval(), images(3)
    result = bgd.quantize(model, data, em(float_storage="float16"), progress=False)
    bgd.save(result.model, tmp_path / "net")
    net = bgd.load(tmp_path / "net", like=model)
    assert all(
        torch.equal(a, b) for a, b in zip(result.model.state_dict().values(), net.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        assert torch.equal(net(data[0]), result.model(data[0]))


class _Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 5)
        self.table = nn.Parameter(1e4 ** (-torch.arange(12) / 12), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.a(x + torch.cos(1e3 * self.table))))  # type: ignore[no-any-return]


def test_a_frozen_table_stays_exact_and_is_counted_so(tmp_path: Path) -> None:
    model, config = _Positions().eval(), em(float_storage="float16")
    result = bgd.quantize(model, vectors(), config, progress=False)
    assert torch.equal(result.model.table, model.table)
    assert bgd.plan(model, config).compressed_bytes == bgd.save(result.model, tmp_path / "net")


def test_a_network_that_is_frozen_for_inference_is_rounded_as_any_other() -> None:
    model = _Positions().eval().requires_grad_(False)
    result = bgd.quantize(model, vectors(), em(float_storage="float16"), progress=False)
    assert torch.equal(result.model.b.bias, result.model.b.bias.half().float())
    assert torch.equal(result.model.table, model.table.half().float())


def test_values_out_of_range_stay_and_sharing_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].bias.fill_(1e30)
        model[1].bias.fill_(1e-30)
    before = model[0].weight.detach().clone()
    round_floats_(model)
    assert model[1].weight is model[0].weight
    assert torch.equal(model[0].weight, before.half().float())
    assert torch.all(model[0].bias == 1e30)
    assert torch.all(model[1].bias == torch.tensor(1e-30))
