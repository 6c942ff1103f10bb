"""A budget: the knapsack, the file that it ends in, what is fixed, and what is said."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, FinetuningConfig, LayerConfig
from bgd_plugin.calibration import collect_batches
from bgd_plugin.errors import ConfigError
from bgd_plugin.files.format import file_bytes, stored
from bgd_plugin.graph import copy_module, trace
from bgd_plugin.planning.budget import Budget
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.planning.survey import surveyed
from tests.networks import em, images, randomized, vectors


class _Mobile(nn.Module):
    """Inverted bottlenecks with depthwise layers that stay float, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 24, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.blocks = nn.ModuleList([self._block(24, inner) for inner in (96, 120, 144)])
        self.head = nn.Linear(24, 100)

    @staticmethod
    def _block(width: int, inner: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(width, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU6(),
            nn.Conv2d(inner, width, 1, bias=False),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.mean((2, 3)))


class _Residual(nn.Module):
    """3×3 convolutions of several widths."""

    def __init__(self) -> None:
        super().__init__()
        pairs = itertools.pairwise([3, 8, 12, 16, 16, 20, 20, 24, 24])
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs)
        )
        self.fc = nn.Linear(24, 50)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x).mean((2, 3)))


def _linear() -> nn.Module:
    """Linear layers of several widths, whose output is no logits."""
    pairs = itertools.pairwise([12, 32, 40, 48, 48, 56, 56, 64, 64, 64])
    return nn.Sequential(*(part for a, b in pairs for part in (nn.Linear(a, b), nn.Tanh())), nn.Unflatten(1, (8, 8)))


NETWORKS: dict[str, Any] = {"mobile": _Mobile, "residual": _Residual, "linear": _linear}


def _data(name: str) -> list[Tensor]:
    return vectors() if name == "linear" else images()


@pytest.mark.parametrize("name", NETWORKS)
def test_budgets_are_met_from_below(name: str) -> None:
    model = randomized(NETWORKS[name]())
    graph = trace(copy_module(model))
    batches = collect_batches(_data(name), model, device=torch.device("cpu"), forward=None)
    config = em(target_bytes=2**20, float_storage="float16")
    budget = Budget.of(surveyed(graph, config, original=model))
    assert budget is not None
    sensitivities = measure_sensitivities(graph, batches, budget.free, config, lambda: None)
    least, most = _range(model)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        target = int(least + share * (most - least))
        spent = replace(budget, target_bytes=target).spend(sensitivities)
        assert 0.98 * target <= budget.sketch.file_size(spent.chosen) <= target, share


@pytest.mark.parametrize("name", NETWORKS)
def test_a_quantized_network_keeps_to_its_budget(name: str) -> None:
    model = randomized(NETWORKS[name]())
    target = sum(_range(model)) // 2
    config = em(target_bytes=target, float_storage="float16", em_iterations=2)
    report = bgd.quantize(model, _data(name), config, progress=False).report
    assert 0.98 * target <= report.compressed_bytes <= target
    assert f"budget: {report.compressed_bytes:,} of {target:,} bytes" in report.notes[0]
    note = re.compile(r"budget: .* \S+ if only this layer is quantized, at \d+×\d+; expected ")
    assert all(note.match(layer.note) for layer in report.layers)
    assert report.seconds["budget"] > 0


def _range(model: nn.Module) -> tuple[int, int]:
    """The least possible size, and about that with most layers in 8 bits or more."""
    least = _least(model)
    return least, least + int(1.2 * sum(p.numel() for p in model.parameters()))


def _least(model: nn.Module) -> int:
    with pytest.raises(ConfigError, match="the least possible size is") as error:
        bgd.plan(model, BGDConfig(target_bytes=1))
    return int(re.findall(r"least possible size is ([\d,]+)", str(error.value))[0].replace(",", ""))


@pytest.mark.parametrize("method", ["em", "full"])
def test_the_file_is_as_long_as_the_report_says(method: Any) -> None:
    model = randomized(_Mobile())
    result = bgd.quantize(model, images(), BGDConfig(method=method, target_ratio=2.2), progress=False)
    original = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert len(file_bytes(stored(result.model))) == result.report.compressed_bytes <= original / 2.2


_COUNTING = FinetuningConfig(steps=10, trained="codebooks")  # norms are in training mode


@pytest.mark.parametrize("fields", [{"float_storage": "float32"}, {"finetuning": _COUNTING}])
def test_what_changes_on_the_way_does_not_break_the_budget(fields: dict[str, Any]) -> None:
    """Statistics that half precision holds at first, and counts of batches that a byte holds at first."""
    model = randomized(_Mobile())
    for name, buffer in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            buffer.copy_(buffer.round())
        elif name.endswith("num_batches_tracked"):
            buffer.fill_(250)
    target = 50_000 if fields.get("float_storage") == "float32" else 28_000
    config = em(**({"float_storage": "float16", "batchnorm": "matched", "target_bytes": target} | fields))
    result = bgd.quantize(model, images(), config, progress=False)
    assert 0.98 * target <= result.report.compressed_bytes <= target
    assert len(file_bytes(stored(result.model))) == result.report.compressed_bytes
    counts = {int(v) for name, v in result.model.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == ({260} if "finetuning" in fields else {250})


def test_the_least_possible_size_can_be_had_and_one_byte_less_cannot() -> None:
    model = randomized(_Residual())
    config = BGDConfig(target_bytes=_least(model))
    assert bgd.plan(model, config).compressed_bytes == config.target_bytes
    with pytest.raises(ConfigError, match="cannot be reached"):
        bgd.plan(model, BGDConfig(target_bytes=_least(model) - 1))


def test_what_cannot_be_reached_is_said_before_the_data_is_read() -> None:
    def unread() -> Any:
        raise AssertionError("read")
        yield

    with pytest.raises(
        ConfigError, match=r"a file of 10 bytes cannot be reached: the least possible size is [\d,]+ by"
    ):
        bgd.quantize(_Residual(), unread(), em(target_bytes=10), progress=False)


def test_more_bytes_lose_less() -> None:
    with torch.device("meta"):
        model = _linear()
    least, most = _range(model)
    plans = [bgd.plan(model, BGDConfig(target_bytes=int(least + i * (most - least) / 4))) for i in range(4)]
    losses = [float(re.findall(r"lowest expected loss, ([\d.e+-]+)", plan.notes[0])[0]) for plan in plans]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] / 10


def test_a_budget_that_leaves_nothing_to_quantize_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="a budget of 10,000,000 bytes has room for every layer in float: no layer is"
    ):
        bgd.plan(_Residual(), BGDConfig(target_bytes=10_000_000))


def test_the_same_seed_makes_the_same_choice() -> None:
    model, config = randomized(_Mobile()), BGDConfig(target_ratio=2.5)
    one, other = (bgd.quantize(model, images(), config, progress=False) for _ in range(2))
    assert one.report.layers == other.report.layers
    assert file_bytes(stored(one.model)) == file_bytes(stored(other.model))


def test_overrides_and_other_settings_stay_as_they_are() -> None:
    fixed = LayerConfig(block_size=8, codebook_size=8)
    config = em(
        overrides=(("blocks.0.[06]", fixed),),
        linear=LayerConfig(block_size=4, codebook_size=32),
        target_ratio=2.5,
        float_storage="float16",
    )
    report = bgd.quantize(randomized(_Mobile()), images(), config, progress=False).report
    sizes = {layer.name: (layer.block_size, layer.codebook_size) for layer in report.layers}
    assert sizes["blocks.0.0"] == sizes["blocks.0.6"] == (8, 8)
    assert sizes["head"] == (4, 32)
    assert "3 more have fixed sizes" in report.notes[0]


def test_a_plan_says_that_it_has_no_data() -> None:
    plan = bgd.plan(randomized(_Mobile()), BGDConfig(target_ratio=2.5))
    assert "estimated from the weights alone" in plan.notes[1]
    assert all("by the weight's own error" in layer.note for layer in plan.layers)
    assert plan.notes[0] in str(plan)
    assert plan.compressed_bytes <= plan.original_bytes / 2.5
    with torch.device("meta"):
        empty = _Mobile()
    assert all("by the layer's shape" in layer.note for layer in bgd.plan(empty, BGDConfig(target_ratio=2.5)).layers)


def test_a_plan_of_a_real_network_meets_its_budgets() -> None:
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        model = torchvision.models.mobilenet_v3_small()
    for ratio in (6, 20):
        plan = bgd.plan(model, BGDConfig(target_ratio=ratio))
        target = plan.original_bytes / ratio
        assert 0.98 * target <= plan.compressed_bytes <= target


def test_a_pass_with_a_budget_runs_once() -> None:
    from bgd_plugin.graph import trace

    ours = bgd.BGDPass(em(target_ratio=2, float_storage="float16"), images(), progress=False)
    done = ours(trace(randomized(_Mobile())))
    assert done.modified
    assert any("room for it in float" in s.reason for s in ours.report.skipped)  # type: ignore[union-attr]
    assert not ours(done.graph_module).modified


def test_budgets_are_settings_like_others() -> None:
    config = BGDConfig(target_ratio=12.5)
    assert BGDConfig.from_json(config.to_json()) == config
    assert BGDConfig.from_json(replace(config, target_ratio=None, target_bytes=7).to_json()).target_bytes == 7
    assert config.budget_bytes(1000) == 80


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target_bytes": 5, "target_ratio": 2}, "target_bytes=5 and target_ratio=2: give only one of them"),
        ({"target_bytes": 0}, "target_bytes=0: give an integer number of bytes"),
        ({"target_bytes": 5e6}, "target_bytes=5000000.0: give an integer number of bytes"),
        ({"target_ratio": 1}, "target_ratio=1: give a compression ratio above 1"),
        ({"target_ratio": float("nan")}, "target_ratio=nan: give a compression ratio above 1"),
    ],
)
def test_mistakes_in_a_budget(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        BGDConfig(**fields)


def test_counters_of_batches_have_room_to_grow_while_the_network_is_finetuned() -> None:
    """A count of batches is stored as narrow as it is, and eight bytes at most."""
    model = randomized(_Mobile())
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    least = []
    for finetuning in (None, FinetuningConfig(steps=300)):
        with pytest.raises(ConfigError, match="the least possible size is") as error:
            bgd.plan(model, BGDConfig(target_bytes=1, finetuning=finetuning))
        least.append(int(re.findall(r"least possible size is ([\d,]+)", str(error.value))[0].replace(",", "")))
    assert least[1] - least[0] == 8 * norms


@pytest.mark.parametrize(("storage", "size"), [("float16", 2), ("float32", 4)])
def test_a_layer_in_float_costs_what_it_is_stored_in(storage: Any, size: int) -> None:
    """A budget weighs float against codes by the bytes that the file will have."""
    graph = trace(copy_module(nn.Sequential(nn.Linear(12, 32), nn.Linear(32, 48)))).eval()
    config = BGDConfig(target_bytes=4_000, float_storage=storage)
    budget = Budget.of(surveyed(graph, config, original=graph))
    assert budget is not None
    (options,) = budget._options
    assert [o.size_bytes for o in options if o.layer is None] == [size * 32 * 48]
