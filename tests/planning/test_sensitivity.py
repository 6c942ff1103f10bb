"""What is measured for a budget, against networks in which one layer really is quantized."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.calibration import Batch, collect_batches, first_samples
from bgd_plugin.graph import copy_module, find_layers, isolate_weights_, trace
from bgd_plugin.planning import extrapolate, sensitivity
from bgd_plugin.planning.answers import output_loss
from bgd_plugin.planning.candidates import codebook_sizes
from bgd_plugin.planning.losses import Sensitivity
from bgd_plugin.planning.sensitivity import measure_sensitivities
from bgd_plugin.training import kl_to_teacher
from tests.networks import FunctionalNet, TwiceNet, em, images, randomized, vectors


def _measured(model: nn.Module, data: list[Tensor], config: BGDConfig, names: list[str]) -> dict[str, Sensitivity]:
    graph = trace(copy_module(model)).eval()
    batches = collect_batches(data, model, device=torch.device("cpu"), forward=None)
    layers = [layer for layer in find_layers(graph)[0] if layer.name in names]
    isolate_weights_(graph, layers)
    return measure_sensitivities(graph, batches, layers, config, lambda: None)


class _Wide(nn.Module):
    """Layers wide enough for real codebooks, one of them hardly heard by the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(32, 32, 1)
        self.heard = nn.Conv2d(32, 48, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(48)
        self.quiet = nn.Conv2d(48, 48, 1)
        self.head = nn.Linear(48, 60)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.heard(torch.tanh(self.stem(x)))))
        return self.head((x + 0.01 * self.quiet(x))[:, :, 3, 4])


@pytest.mark.parametrize("method", ["em", "full"])
def test_the_expected_loss_is_that_of_a_network_with_this_layer_quantized(method: Any) -> None:
    model = randomized(_Wide())
    model.head.weight.data *= 4
    data = images(batches=16, batch=8, channels=32)
    config = BGDConfig(
        method=method, batchnorm="matched" if method == "full" else "keep", float_storage="float32", max_divergence=None
    )
    names = ["heard", "quiet", "head"]
    found = _measured(model, data, config, names)
    for name in ("heard", "head"):
        for k in (16, 64):
            setting = LayerConfig(block_size=9 if name == "heard" else 4, codebook_size=k)
            alone = [(name, setting)] + [(other, None) for other in names if other != name]
            one = BGDConfig(**(vars(config) | {"overrides": tuple(alone)}))
            result = bgd.quantize(model, data, one, progress=False)
            with torch.no_grad():
                pairs = [(result.model(x), model(x)) for x in data]
            real = float(kl_to_teacher(*(torch.cat(outputs) for outputs in zip(*pairs, strict=True))))
            expected = found[name].loss(setting.block_size, k)
            assert real / 2 < expected < real * 2, (name, k, expected, real)
    assert found["quiet"].loss(4, 64) < found["heard"].loss(9, 64) / 100


def test_the_network_stays_as_it_is() -> None:
    model = randomized(_Wide())
    graph = trace(copy_module(model, share_tensors=True)).eval()
    before = {name: value.clone() for name, value in graph.state_dict().items()}
    batches = collect_batches(images(channels=32), model, device=torch.device("cpu"), forward=None)
    layers = [layer for layer in find_layers(graph)[0] if layer.name in ("heard", "head")]
    measure_sensitivities(graph, batches, layers, BGDConfig(max_divergence=None), lambda: None)
    after = graph.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_layer_by_function_or_with_two_calls_is_measured_too() -> None:
    found = _measured(FunctionalNet().eval(), images(), BGDConfig(max_divergence=None), ["own", "kernel", "matrix"])
    assert all(s.loss(c.block_size, 16) > 0 for s in found.values() for c in s.curves)
    assert set(_measured(TwiceNet().eval(), vectors(), BGDConfig(max_divergence=None), ["shared"])) == {"shared"}


def test_a_layer_without_any_input_costs_nothing() -> None:
    model = randomized(_Wide())
    model.stem.weight.data.zero_()
    model.stem.bias.data.zero_()
    for method in ("em", "full"):
        found = _measured(model, images(channels=32), BGDConfig(method=method, max_divergence=None), ["heard"])["heard"]
        assert found.loss(9, 16) < 1e-6


@pytest.mark.parametrize("size", [1e-12, 0.0])
def test_logits_that_hardly_vary_leave_no_layer_without_a_loss(size: float) -> None:
    """A divergence of nothing in every layer would spend nothing of a budget."""
    model = randomized(_Wide())
    model.head.weight.data *= size
    model.head.bias.data.zero_()
    found = _measured(model, images(channels=32), BGDConfig(max_divergence=None), ["heard", "quiet", "head"])
    assert all(s.per_error() > 0 and "squared difference" in s.reason for s in found.values())
    config = BGDConfig(target_bytes=14_000)
    report = bgd.quantize(model, images(channels=32), config, progress=False).report
    assert 0.9 * 14_000 < report.compressed_bytes <= 14_000
    said = [note for note in report.notes if "to stay within it" in note]
    assert len(said) == (1 if size else 0)
    assert all(note.endswith(": head.bias") for note in said)


def test_a_layer_that_does_nothing_takes_what_is_left() -> None:
    model = randomized(_Wide())
    model.quiet.weight.data.zero_()
    model.quiet.bias.data.zero_()
    found = _measured(model, images(channels=32), BGDConfig(max_divergence=None), ["heard", "quiet", "head"])
    largest = max(one.per_error() for one in found.values())
    assert found["quiet"].per_error() == pytest.approx(1e-6 * largest, rel=1e-3)


def test_a_cluster_of_samples_is_cut_where_it_can_be() -> None:
    batches = [Batch((torch.zeros(20, 3),)), Batch((torch.zeros(20, 3),), {"mask": torch.ones(20)}), Batch((), {})]
    assert [b.size for b in first_samples(batches, 32)] == [20, 12]
    assert first_samples(batches, 32)[1].kwargs["mask"].shape == (12,)
    odd = [Batch((torch.zeros(20, 3), torch.ones(7)))]
    assert [b.size for b in first_samples(odd, 8)] == [20]


def test_logits_are_compared_by_kl_and_all_else_by_squares() -> None:
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    kl = pytest.approx(float(kl_to_teacher(one, other)))
    assert output_loss(one, other) == (kl, "KL")
    assert output_loss({"logits": one}, {"logits": other}) == (kl, "KL")
    assert output_loss(SimpleNamespace(logits=one), SimpleNamespace(logits=other)) == (kl, "KL")
    boxes = torch.randn(4, 5, 6)
    loss, measure = output_loss([boxes * 1.1, one], [boxes, one])
    assert loss == pytest.approx(float((0.1 * boxes).square().sum() / (boxes.square().sum() + one.square().sum())))
    assert "squared" in measure
    assert output_loss(one[:, :1], one[:, :1]) == (0.0, "relative squared difference of outputs")
    assert output_loss(one * float("inf"), other)[0] == float("inf")


def test_an_embedding_network_has_a_budget_too() -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    report = bgd.quantize(model, vectors(), em(target_ratio=4), progress=False).report
    assert "relative squared difference of outputs" in report.layers[0].note


# --- the network in which one layer alone is roughly quantized


def _alone(model: nn.Module, at: str, data: list[Tensor], name: str, **fields: Any) -> tuple[Tensor, Tensor]:
    """Outputs of a module, `[channels, positions]`: in the float network, and while the layer's cost is measured."""
    seen: list[Tensor] = []
    hook = model.get_submodule(at).register_forward_hook(lambda _, args, out: seen.append(out.detach().clone()))
    with torch.no_grad():
        for batch in data:
            model(batch)
    exact = seen[:]
    _measured(model, data, BGDConfig(**fields, max_divergence=None), [name])
    hook.remove()
    rough = [x for x in seen if not any(x.shape == y.shape and torch.allclose(x, y, atol=1e-5) for y in exact)]
    assert len(rough) == len(data)
    return tuple(torch.cat(values).double().transpose(0, 1).flatten(1) for values in (exact, rough))  # type: ignore[return-value]


@pytest.mark.parametrize("method", ["full", "em"])
def test_a_norm_keeps_the_mean_and_the_spread_of_the_rough_layers_outputs(method: Any) -> None:
    """As the correction does in a run: a cost that is theirs would be counted although nothing of it stays."""
    model = randomized(_Wide())
    exact, rough = _alone(model, "norm", images(4, batch=4, channels=32), "heard", method=method)
    assert float((rough - exact).square().mean() / exact.var()) > 1e-3
    torch.testing.assert_close(rough.mean(1), exact.mean(1), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(rough.std(1), exact.std(1), rtol=2e-3, atol=1e-5)


def test_a_bias_keeps_the_mean_of_the_rough_layers_outputs() -> None:
    model = randomized(_Wide())
    exact, rough = _alone(model, "quiet", images(4, batch=4, channels=32), "quiet")
    assert float((rough - exact).square().mean() / exact.var()) > 1e-3
    torch.testing.assert_close(rough.mean(1), exact.mean(1), rtol=1e-3, atol=1e-5)


def test_without_norm_and_bias_the_mean_is_not_kept() -> None:
    model = nn.Sequential(nn.Linear(12, 64), nn.Sigmoid(), nn.Linear(64, 64, bias=False), nn.Tanh(), nn.Linear(64, 8))
    exact, rough = _alone(model.eval(), "2", vectors(2, batch=8), "2")
    assert float((rough.mean(1) - exact.mean(1)).abs().max()) > 1e-3


def test_the_cost_is_that_of_the_network_in_which_it_is_measured() -> None:
    """The mean over the samples of what the outputs of the rough network lose, one batch smaller than the others."""
    model = randomized(_Wide())
    model.head.weight.data *= 4
    data = [*images(2, batch=7, channels=32), *images(1, batch=2, channels=32, seed=5)]
    exact, rough = (x.T for x in _alone(model, "head", data, "heard"))
    said = _measured(model, data, BGDConfig(max_divergence=None), ["heard"])["heard"]
    expected = float(kl_to_teacher(rough.float(), exact.float()))
    assert float(said.reason.split(" if only")[0].split(" ")[-1]) == pytest.approx(expected, rel=0.06)


# --- what an error counts, literally


@pytest.fixture
def curves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
    """Blocks, metrics and codebook sizes of every error curve."""
    real, seen = sensitivity.quick_fits, list[tuple[Tensor, Tensor, tuple[int, ...]]]()

    def watched(blocks: Tensor, metrics: Tensor, sizes: Any, **kwargs: Any) -> Any:
        seen.append((blocks.clone(), metrics.clone(), tuple(sizes)))
        return real(blocks, metrics, sizes, **kwargs)

    monkeypatch.setattr(sensitivity, "quick_fits", watched)
    return seen


def _literal_metric(h: Tensor, block_size: int, *, feedback: bool) -> list[Tensor]:
    """For each block position: (H⁻¹ of the columns from there on, its first block)⁻¹; or the mean of H's blocks."""
    places = range(0, len(h), block_size)
    if feedback:
        return [torch.inverse(torch.inverse(h[i:, i:])[:block_size, :block_size]) for i in places]
    mean = torch.stack([h[i : i + block_size, i : i + block_size] for i in places]).mean(0)
    return [mean for _ in places]


@pytest.mark.parametrize("method", ["full", "em"])
@pytest.mark.parametrize("rows", [40, 800])
@pytest.mark.parametrize("kind", ["norm", "bias", "plain"])
def test_errors_count_what_the_fit_will_leave_of_them(
    curves: list[tuple[Tensor, Tensor, tuple[int, ...]]], method: Any, rows: int, kind: str
) -> None:
    """Rows scaled for a norm, means taken out where something takes them, feedback where rows are many enough."""
    layers = [nn.Linear(12, 32), nn.Sigmoid(), nn.Linear(32, 48, bias=kind == "bias")]
    model = randomized(nn.Sequential(*layers, nn.BatchNorm1d(48) if kind == "norm" else nn.Tanh(), nn.Linear(48, 8)))
    data = vectors(4, batch=rows // 4)
    _measured(model, data, BGDConfig(method=method, batchnorm="matched", max_divergence=None), ["2"])
    with torch.no_grad():
        x = torch.cat([model[1](model[0](batch)) for batch in data]).double()
    full = method == "full"
    x = x - x.mean(0) if kind == "norm" or (full and kind == "bias") else x
    h = x.T @ x / len(x)
    weight = model[2].weight.detach().double()
    power = ((weight @ h) * weight).sum(1)
    scale = power.rsqrt() if full and kind == "norm" else power.mean().rsqrt().expand(48)
    h = h + min(1.0, 0.2 * (1 + 32 / len(x))) * h.diag().mean() * torch.eye(32, dtype=h.dtype)
    assert [blocks.shape[2] for blocks, _, _ in curves] == [1, 2, 4, 8, 16]
    for blocks, metrics, _ in curves:
        d = blocks.shape[2]
        expected = (weight * scale[:, None]).reshape(48, -1, d).transpose(0, 1)
        torch.testing.assert_close(blocks.double(), expected, rtol=1e-3, atol=1e-6)
        literal = torch.stack(_literal_metric(h, d, feedback=full and len(x) >= 64))
        torch.testing.assert_close(metrics.double(), literal, rtol=2e-3, atol=1e-6)


def test_the_loss_of_the_measured_size_is_the_measured_cost() -> None:
    """Every other size is rated by how its error compares with that one's."""
    found = _measured(
        randomized(_Wide()), images(4, batch=8, channels=32), BGDConfig(max_divergence=None), ["heard", "head"]
    )
    for one in found.values():
        cost, block, codebook = re.findall(r"(\S+) if only this layer is quantized, at (\d+)×(\d+)", one.reason)[0]
        assert one.loss(int(block), int(codebook), float(cost)) == pytest.approx(float(cost), rel=0.2)


def test_each_layer_draws_its_own_numbers_and_another_seed_others() -> None:
    model, data = randomized(_Wide()), images(2, batch=4, channels=32)
    both = _measured(model, data, BGDConfig(max_divergence=None), ["heard", "head"])
    assert both["head"] == _measured(model, data, BGDConfig(max_divergence=None), ["head"])["head"]
    assert both["head"] != _measured(model, data, BGDConfig(seed=1, max_divergence=None), ["head"])["head"]


def test_twins_are_measured_with_numbers_of_their_own() -> None:
    """Two layers with the same weight and inputs: what a draw does to a curve is not the same for both."""

    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(12, 64), nn.Linear(12, 64), nn.Linear(64, 8)
            self.two.load_state_dict(self.one.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.one(x)) + torch.tanh(self.two(x)))

    found = _measured(Twins().eval(), vectors(2), BGDConfig(max_divergence=None), ["one", "two"])
    assert found["one"].curves != found["two"].curves


def test_of_very_many_logits_some_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two million in all batches together."""
    real, seen = extrapolate.shifted_logits, list[int]()

    def watched(found: Any, exact: Any, most: int) -> Any:
        seen.append(most)
        return real(found, exact, most)

    monkeypatch.setattr(extrapolate, "shifted_logits", watched)
    model = randomized(_Wide())
    model.head.weight.data *= 4
    _measured(model, images(3, batch=2, channels=32), BGDConfig(max_divergence=None), ["head"])
    assert seen == [2_000_000 // 3] * 3


@pytest.mark.parametrize("is_constant", [False, True])
def test_the_step_is_called_once_for_each_layer(is_constant: bool) -> None:
    """Also where the layers are measured once more, because no divergence moved."""
    model, counted = randomized(_Wide()), list[int]()
    if is_constant:
        model.head.weight.data.zero_()
    batches = collect_batches(images(2, channels=32), model, device=torch.device("cpu"), forward=None)
    graph = trace(copy_module(model)).eval()
    layers = [layer for layer in find_layers(graph)[0] if layer.name in ("heard", "head")]
    measure_sensitivities(graph, batches, layers, BGDConfig(max_divergence=None), lambda: counted.append(1))
    assert len(counted) == 2


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((64, 64), "4×"), ((64, 32, 3, 3), "9×"), ((64, 32, 1, 1), "4×"), ((64, 32, 5, 5), "25×"), ((64, 32, 3, 1), "3×")],
)
def test_a_layer_is_measured_at_the_size_of_its_kind(shape: tuple[int, ...], expected: str) -> None:
    layer = nn.Linear(64, 64) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(8)).eval()
    data = vectors(2, features=64) if len(shape) == 2 else images(2, size=6, channels=32)
    model(data[0])
    said = _measured(model, data, BGDConfig(max_divergence=None), ["0"])["0"]
    most = max(k for k in codebook_sizes(shape, int(expected[:-1])) if k <= 256)
    assert said.reason.endswith(f"only this layer is quantized, at {expected}{most}") and most > 16


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("has_graph", [False, True])
def test_a_transposed_convolution_has_more_rows_than_channels(has_norm: bool, has_graph: bool) -> None:
    """Its bias and its batch norm take out the means of channels, not of rows."""
    torch.manual_seed(0)
    after = nn.BatchNorm2d(24) if has_norm else nn.Identity()
    net: nn.Module = nn.Sequential(nn.ConvTranspose2d(16, 24, 2, 2), after, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = net.append(nn.Linear(24, 10)) if isinstance(net, nn.Sequential) else net
    if not has_graph:
        net = _Valued(net)
    config = bgd.BGDConfig(target_ratio=3.0, first_layer=bgd.LayerConfig(block_size=4))
    plan = bgd.plan(net.eval(), config, [torch.randn(20, 16, 4, 4)], progress=False)
    assert any(layer.kind.startswith("conv_transpose") for layer in plan.layers)


class _Valued(nn.Module):
    """A network whose way depends on its values, so that it has no graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x if float(x.abs().max()) > 0 else x + 1)
        return result
