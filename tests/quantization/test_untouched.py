"""What belongs to the caller stays as it was, whether a call succeeds or fails."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin import DistillationConfig, FinetuningConfig
from bgd_plugin.errors import CalibrationError
from tests.networks import FunctionalNet, PlainNet, SmallResNet, TwiceNet, em, images, randomized, vectors

EVERYTHING = em(
    batchnorm="matched",
    distillation=DistillationConfig(steps=2, batch_size=4, learning_rate=0.01),
    finetuning=FinetuningConfig(steps=2),
)


def _watched(model: nn.Module) -> nn.Module:
    """With a hook, mixed modes and a frozen parameter."""
    model.train()
    modules = list(model.modules())
    modules[-1].eval()
    modules[1].register_forward_hook(_a_hook)
    next(model.parameters()).requires_grad_(False)
    return model


def _a_hook(module: nn.Module, args: Any, output: Any) -> None:
    pass


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a network that a caller could miss: values, identities, modes, flags, hooks, graph."""
    state = model.state_dict(keep_vars=True)
    return {
        "values": {name: value.detach().clone() for name, value in state.items()},
        "tensors": {name: (id(value), value._version, value.dtype) for name, value in state.items()},
        "flags": {name: (p.requires_grad, p.grad is None) for name, p in model.named_parameters()},
        "modules": {path: (id(m), type(m), m.training) for path, m in model.named_modules(remove_duplicate=False)},
        "hooks": {path: (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for path, m in model.named_modules()},
        "graph": str(model.graph) + model.code if isinstance(model, fx.GraphModule) else None,
    }


@contextmanager
def _unchanged(*models: nn.Module) -> Iterator[None]:
    before = [_snapshot(model) for model in models]
    yield
    for model, old in zip(models, before, strict=True):
        new = _snapshot(model)
        values, expected = new.pop("values"), old.pop("values")
        assert new == old
        assert all(torch.equal(values[name], value) for name, value in expected.items())


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "resnet": (lambda: randomized(SmallResNet()), images(2)),
    "plain": (PlainNet, vectors(2)),
    "functional": (FunctionalNet, images(2, size=12)),
    "shared": (TwiceNet, vectors(2)),
    "traced": (lambda: fx.symbolic_trace(randomized(SmallResNet())), images(2)),
    "traced functional": (lambda: fx.symbolic_trace(FunctionalNet()), images(2, size=12)),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_stays_as_it_was(network: str) -> None:
    kind, data = NETWORKS[network]
    model = _watched(kind())
    with _unchanged(model):
        bgd.quantize(model, data, EVERYTHING, progress=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_planning_leaves_the_network_as_it_was(network: str) -> None:
    model = _watched(NETWORKS[network][0]())
    with _unchanged(model):
        bgd.plan(model, em())


@pytest.mark.parametrize("network", ["resnet", "functional"])
def test_the_result_shares_nothing_with_the_network(network: str) -> None:
    kind, data = NETWORKS[network]
    model = kind()
    result = bgd.quantize(model, data, em(), progress=False).model
    with _unchanged(model):
        for tensor in (*result.parameters(), *result.buffers()):
            tensor.data.zero_()


class _Poisoned(nn.Module):
    """Runs into NaN before its third layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = PlainNet()

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[2](self.net[1](self.net[0](x)))
        return self.net[4](torch.log(-x.abs() - 1))


def test_the_network_stays_as_it_was_when_its_activations_are_not_numbers() -> None:
    model = _watched(_Poisoned())
    with _unchanged(model), pytest.raises(CalibrationError, match=r"net\.4"):
        bgd.quantize(model, vectors(), em(), progress=False)


def test_the_network_stays_as_it_was_when_it_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    model = _watched(randomized(SmallResNet()))
    monkeypatch.setattr("bgd_plugin.quantization.resume.Run.store", stop)
    with _unchanged(model), pytest.raises(KeyboardInterrupt):
        bgd.quantize(model, images(), EVERYTHING, progress=False)


def test_the_network_stays_as_it_was_when_it_does_not_trace() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.last = nn.Linear(12, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.fc(x) if x.sum() > -1e9 else x)

    model = _watched(Branches())
    with _unchanged(model):
        result = bgd.quantize(model, vectors(), EVERYTHING, progress=False)
    assert [layer.name for layer in result.report.layers] == ["last"]


def test_another_teacher_stays_as_it_was() -> None:
    teacher = _watched(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)))
    with _unchanged(teacher):
        bgd.quantize(PlainNet(), vectors(), EVERYTHING, teacher=teacher, progress=False)


@pytest.mark.parametrize("network", NETWORKS)
def test_calibration_data_stays_as_it_was(network: str) -> None:
    kind, data = NETWORKS[network]
    before = copy.deepcopy(data)
    bgd.quantize(kind(), data, EVERYTHING, progress=False)
    assert all(torch.equal(batch, old) for batch, old in zip(data, before, strict=True))


class _InPlaceInput(nn.Module):
    """Works in place on its own input, or on a view of it."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first, self.net, self.relu, self.flatten = first, PlainNet(), nn.ReLU(inplace=True), nn.Flatten()

    def forward(self, x: Tensor) -> Tensor:
        if self.first == "view":
            x = self.flatten(x)
        if self.first == "method":
            return self.net(x.mul_(2))
        if self.first == "operator":
            x += 1
            return self.net(x)
        return self.net(self.relu(x))


@pytest.mark.parametrize("first", ["module", "method", "operator", "view"])
@pytest.mark.parametrize("config", [em(), EVERYTHING])
def test_calibration_data_stays_as_it_was_under_a_network_that_works_in_place(
    first: str, config: bgd.BGDConfig
) -> None:
    data = vectors(2)
    before = copy.deepcopy(data)
    bgd.quantize(_InPlaceInput(first), data, config, progress=False)
    assert all(torch.equal(batch, old) for batch, old in zip(data, before, strict=True))


def test_the_global_random_state_stays_as_it_was() -> None:
    model, before = randomized(SmallResNet()), torch.get_rng_state()
    bgd.quantize(model, images(2), EVERYTHING, progress=False)
    assert torch.equal(torch.get_rng_state(), before)


def test_saving_and_materializing_leave_the_network_as_it_was(tmp_path: Path) -> None:
    model = _watched(bgd.quantize(randomized(SmallResNet()), images(2), em(), progress=False).model)
    with _unchanged(model):
        bgd.save(model, tmp_path / "net")
        bgd.materialize(model)


def test_a_pass_leaves_its_graph_as_it_was() -> None:
    traced = _watched(fx.symbolic_trace(randomized(SmallResNet())))
    with _unchanged(traced):
        bgd.BGDPass(em(), images(), progress=False)(traced)
