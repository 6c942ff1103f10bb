"""The benchmarks' own machinery, on networks that take no time: figures in the docs rest on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import LayerInputs
from bgd_plugin.pq import feedback, positions
from tests.networks import FunctionalNet, SmallResNet, images, randomized

pytest.importorskip("torchvision", reason="the benchmarks' networks are torchvision's")

from tests.benchmarks import inference, sweeps
from tests.benchmarks.layer_error import layer_errors
from tests.benchmarks.lite0 import Crops, arms, stages
from tests.benchmarks.peers import language_page
from tests.benchmarks.peers.build import PackedWeight, compress
from tests.benchmarks.peers.frameworks import hqq
from tests.benchmarks.peers.grids import gptq, round_to_nearest
from tests.benchmarks.peers.language import compressed, linear_layers
from tests.benchmarks.peers.page import markdown, merge
from tests.benchmarks.peers.subjects import Subject


@pytest.fixture(params=[SmallResNet, FunctionalNet])
def subject(request: pytest.FixtureRequest) -> Subject:
    batches = images()
    model = randomized(request.param()).eval()
    with torch.no_grad():
        labels = torch.cat([model(batch) for batch in batches]).argmax(1)
    return Subject(name="small", images="few", model=model, calibration=batches, judged=batches, labels=labels)


def _unchanged(weight: Tensor, inputs: LayerInputs) -> PackedWeight:
    return PackedWeight(weight=weight, tensors={"all": weight.clone()})


def test_a_quantizer_that_changes_nothing_leaves_the_network_as_it_is(subject: Subject) -> None:
    done = compress(subject, _unchanged)
    assert subject.judge(done.model)["agreement"] == 100
    assert subject.judge(done.model)["kl"] < 1e-4  # what half precision does to the rest
    quantized = [layer.weights for layer in bgd.plan(subject.model).layers]
    assert 4 * sum(quantized) < done.bytes < 4 * sum(p.numel() for p in subject.model.parameters()) + 8192


def test_more_bits_cost_more_and_lose_less(subject: Subject) -> None:
    few, many = (compress(subject, round_to_nearest(bits)) for bits in (2, 8))
    assert few.bytes < many.bytes
    assert subject.judge(many.model)["kl"] < subject.judge(few.model)["kl"]


def test_the_grids_file_is_counted_to_the_byte() -> None:
    packed = round_to_nearest(3)(torch.randn(8, 40), None)  # type: ignore[arg-type]
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in packed.tensors.items()}
    # 40 columns are a group of 32 and one of 8
    assert sizes == {"codes": 8 * 40 * 3 // 8, "zeros": 8 * 2 * 3 // 8, "scales": 8 * 2 * 2}


def test_gptq_keeps_the_outputs_better_than_rounding() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4096, 48) @ torch.randn(48, 48)
    weight = torch.randn(32, 48)

    class Inputs:
        name = "layer"

        def __len__(self) -> int:
            return 1

        def some(self, rows: int) -> Any:
            return self

        def pairs(self) -> Any:
            from bgd_plugin.pq.blocks import Geometry

            yield inputs, inputs, Geometry.of((), 1, 0, 1, 1)

    def error(decoded: Tensor) -> float:
        return float((inputs @ (weight - decoded).T).square().sum())

    rounded = round_to_nearest(3)(weight, Inputs())  # type: ignore[arg-type]
    fed_back = gptq(3)(weight, Inputs())  # type: ignore[arg-type]
    assert error(fed_back.weight) < 0.7 * error(rounded.weight)
    assert {n: t.shape for n, t in fed_back.tensors.items()} == {n: t.shape for n, t in rounded.tensors.items()}


def test_layer_errors_fall_with_the_default_method() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 96, 3), nn.ReLU(), nn.Conv2d(96, 128, 1, bias=False), nn.BatchNorm2d(128)).eval()
    mixed = [torch.randn(16, 3, 8, 8).cumsum(3) for _ in range(4)]
    (layer,) = layer_errors(model, mixed[:2], mixed[2:])
    assert (layer.name, layer.weights) == ("2", 96 * 128)
    assert 0 < layer.error["default"] < layer.error["paper"] < 1
    assert 0 < layer.gain < 1


def test_sweeps_are_timed_both_ways_and_leave_things_as_they_were(capsys: pytest.CaptureFixture[str]) -> None:
    before = feedback.can_sweep, positions._RELAXATION, positions._ON_A_LINE
    sweeps.main(["--layers", "0"])
    (row,) = capsys.readouterr().out.splitlines()[2:]
    assert row.startswith("576×576") and row.count("→") == 3
    assert (feedback.can_sweep, positions._RELAXATION, positions._ON_A_LINE) == before


@pytest.mark.parametrize("block_size", [4, None])
def test_times_of_layers_in_a_turn_are_of_one_of_them(block_size: int | None) -> None:
    ran: list[int] = []
    hook = nn.modules.module.register_module_forward_hook(lambda *given: ran.append(given[1][0].shape[0]))
    try:
        arms = inference.layer_arms(64, block_size, 2, 3)
        for name in ("float", "kernels", "plain"):
            arms[name]()
            assert ran == [2] * 3, name
            ran.clear()
    finally:
        hook.remove()
    ticks = iter(range(0, 1000, 12))  # each look at the clock is 12 seconds after the one before
    found = inference.compare("it", {"float": lambda: None}, 2, lambda: next(ticks), calls=2, layers=3)
    assert [row.milliseconds for row in found] == [2000.0]


def test_a_new_row_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    row = {"network": "n", "images": "i", "method": "RTN g32", "arm": "RTN g32 2-bit", "bytes": 5_000}
    row |= {"top1": 1.0, "agreement": 2.0, "kl": 3.0, "cpu_seconds": 4.0}
    rows = merge(merge([], row), row | {"arm": "RTN g32 3-bit", "bytes": 7_000})
    rows = merge(rows, row | {"top1": 9.0})
    assert [(r["arm"], r["top1"]) for r in rows] == [("RTN g32 2-bit", 9.0), ("RTN g32 3-bit", 1.0)]
    assert "| RTN g32 3-bit | 6.84 KiB | 7,000 | 1.00 | 2.00 | 3.0000 | 4 |" in markdown(rows)


def test_crops_are_the_photos_once_and_then_others_each_walk() -> None:
    photos = images(2, size=16, batch=20)
    crops = Crops(photos)
    assert torch.equal(torch.cat(list(crops)), torch.cat(photos))
    walks = []
    for number in (1, 2, 1):
        crops.set_epoch(number)
        walks.append(torch.cat(list(crops)))
    assert walks[0].shape == torch.cat(photos).shape
    assert torch.equal(walks[0], walks[2]) and not torch.equal(walks[0], walks[1])


def test_single_steps_are_measured_at_the_sizes_of_the_budget() -> None:
    model, data = randomized(SmallResNet()), images()
    report = bgd.quantize(model, data, bgd.BGDConfig(target_bytes=6000), progress=False).report
    names = [layer.name for layer in bgd.plan(model).layers]
    chosen = {layer.name: (layer.block_size, layer.codebook_size) for layer in report.layers}
    assert chosen
    for name, config in arms(report, names, bgd.FinetuningConfig(steps=1)).items():
        if name.startswith("sizes"):
            planned = bgd.plan(model, config)
            assert {layer.name: (layer.block_size, layer.codebook_size) for layer in planned.layers} == chosen


def test_training_of_some_layers_is_that_of_all_stages_but_codes_chosen_again() -> None:
    found = stages(bgd.FinetuningConfig(steps=30, layers=("fc",)))
    training = {name: config.finetuning for name, config in found.items() if config.finetuning}
    assert {name for name, one in training.items() if one.layers != ("fc",)} == {"finetuning and codes, entropy-coded"}
    assert [one.recode_every for one in training.values()] == [None, None, 3]


@pytest.fixture
def stack() -> tuple[nn.Sequential, list[Tensor]]:
    """Two linear layers whose inputs are far from white, and a head of the name that language models give it."""
    torch.manual_seed(0)
    model = nn.Sequential()
    for name, module in (("one", nn.Linear(64, 96)), ("act", nn.GELU()), ("two", nn.Linear(96, 64))):
        model.add_module(name, module)
    model.add_module("lm_head", nn.Linear(64, 10))
    return model.eval(), list((torch.randn(1024, 64) @ torch.randn(64, 64)).split(256))


@torch.no_grad()
def _lost(model: nn.Module, other: nn.Module, batches: list[Tensor]) -> float:
    exact, found = (torch.cat([one(x) for x in batches]) for one in (model, other))
    return float((exact - found).square().sum() / exact.square().sum())


def test_a_peer_on_a_language_model_leaves_the_head_and_the_model_alone(
    stack: tuple[nn.Sequential, list[Tensor]],
) -> None:
    model, batches = stack
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert list(linear_layers(model)) == ["one", "two"]
    for quantizer, has_inputs in ((round_to_nearest(2), False), (gptq(2), True)):
        small, size = compressed(model, batches, quantizer, has_inputs=has_inputs)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert torch.equal(small.lm_head.weight, model.lm_head.weight)
        assert not torch.equal(small.one.weight, model.one.weight)
        # codes of 2 bits, for each group of 32 a zero point of 2 bits and a scale of 16
        assert size == 2 * (64 * 96 * 2 + 64 * 96 // 32 * 18) // 8


def test_gptq_by_activation_on_columns_of_unequal_size(stack: tuple[nn.Sequential, list[Tensor]]) -> None:
    model, batches = stack
    scale = torch.logspace(-1, 1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))]
    model.one.weight = nn.Parameter(model.one.weight.detach() / scale)
    batches = [batch * scale for batch in batches]
    plain, own_bytes = compressed(model, batches, gptq(2), has_inputs=True)
    ordered, size = compressed(model, batches, gptq(2, by_activation=True), has_inputs=True)
    assert _lost(model, ordered, batches) < _lost(model, plain, batches)
    assert size == own_bytes + 2 * (64 + 96)  # the order of each layer's columns


def test_rows_on_a_language_model_replace_those_of_the_same_arm(tmp_path: Path) -> None:
    row = {"arm": "RTN g32, 2 bits", "method": "RTN g32", "bits": 2.5625, "bytes": 5_000}
    row |= {"perplexity": 1234.5, "cpu_seconds": 4.0}
    path = tmp_path / "rows.json"
    for one in (row, row | {"arm": "RTN g32, 3 bits", "bytes": 4_000}, row | {"perplexity": 99.0}):
        language_page.keep(path, one)
    rows = language_page.read(path)
    assert [(one["arm"], one["perplexity"]) for one in rows] == [("RTN g32, 3 bits", 1234.5), ("RTN g32, 2 bits", 99.0)]
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- language: written by the command -->\nold\n<!-- end of language -->\nb\n")
    language_page.write_page(rows, page)
    assert "| RTN g32, 2 bits | 2.56 | 4.88 KiB | 5,000 | 99.00 | 4 |" in page.read_text()
    assert "old" not in page.read_text() and page.read_text().startswith("a\n") and page.read_text().endswith("b\n")
    language_page.plot(rows, tmp_path / "rows.png")
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_gptq_on_a_language_model_loses_less_than_rounding(stack: tuple[nn.Sequential, list[Tensor]]) -> None:
    model, batches = stack
    rounded, fed = (compressed(model, batches, one(3), has_inputs=one is gptq)[0] for one in (round_to_nearest, gptq))
    assert _lost(model, fed, batches) < 0.7 * _lost(model, rounded, batches)


def test_gptq_gets_the_inputs_that_the_layers_before_leave(
    stack: tuple[nn.Sequential, list[Tensor]],
) -> None:
    model, batches = stack
    seen: list[Tensor] = []

    def watched(weight: Tensor, inputs: Any) -> PackedWeight:
        seen.append(torch.cat([mine for mine, _, _ in inputs.pairs()]))
        return PackedWeight(weight=0.5 * weight, tensors={"all": weight})

    small, _ = compressed(model, batches, watched, has_inputs=True)
    assert torch.equal(seen[0], torch.cat(batches))
    with torch.no_grad():
        torch.testing.assert_close(seen[1], torch.cat([small.act(small.one(x)) for x in batches]))


@pytest.mark.parametrize("bits", [2, 3])
def test_hqq_is_decoded_as_the_library_decodes_it(bits: int) -> None:
    library = pytest.importorskip("hqq.core.quantize", reason="the extra peers has it").Quantizer
    torch.manual_seed(0)
    weight = torch.randn(32, 128)
    packed = hqq(bits)(weight, None)  # type: ignore[arg-type]
    assert sum(t.numel() * t.element_size() for t in packed.tensors.values()) == 32 * 128 * bits // 8 + 64 * 4
    codes, meta = library.quantize(weight, nbits=bits, group_size=64, axis=1, device="cpu", compute_dtype=torch.float32)
    torch.testing.assert_close(packed.weight, library.dequantize(codes, meta).float(), rtol=0, atol=5e-3)
    assert float((packed.weight - weight).square().mean()) < 4.0 ** (0.9 - bits)
