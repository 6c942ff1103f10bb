"""The network that comes back is the one that went in, or the call refuses: networks out of the ordinary."""

from __future__ import annotations

import collections
import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin import BGDConfig, LayerConfig
from bgd_plugin.errors import CalibrationError, CheckpointError, TraceError
from tests.networks import PlainNet, SmallResNet, em, images, randomized, vectors

FINE = LayerConfig(block_size=1, codebook_size=256)
CONFIG = BGDConfig(
    conv=FINE,
    pointwise_conv=FINE,
    linear=FINE,
    first_layer=FINE,
    float_storage="float32",
    rounds=1,
    max_divergence=None,
)


class Block(nn.Module):
    """Convolution, norm, gate, and a projection by attention: a piece of each kind of network."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.gate, self.out = nn.Conv2d(16, 16, 1), nn.Linear(16, 8)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, scale: Tensor | None = None, raw: bool = False) -> Any:
        y = self.norm(self.conv(x))
        y = y * torch.sigmoid(self.gate(y))
        y = y if scale is None else y * scale
        if self.branches and y.sum() > 1e9:
            y = -y
        y = self.out(y.mean((2, 3)))
        return y if raw else collections.OrderedDict(out=y, size=8)

    def predict(self, x: Tensor) -> Tensor:
        return self(x)["out"].argmax(1)  # type: ignore[no-any-return]


def _patched(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x) * 2


def _patched_before(layer: Any) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x * 0.5)


def _hook_after(layer: Any) -> None:
    layer.register_forward_hook(lambda module, args, output: output + 1)


def _hook_before(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 3, *args[1:]))


def _hook_that_keeps(layer: Any) -> None:
    layer.kept = {}
    layer.register_forward_hook(lambda module, args, output: layer.kept.__setitem__("x", output))


def _counter(layer: Any) -> None:
    layer.register_forward_pre_hook(lambda module, args: setattr(module, "count", getattr(module, "count", 0) + 1))


CHANGES: dict[str, Callable[[Any], None]] = {
    "patched": _patched,
    "patched before": _patched_before,
    "hook after": _hook_after,
    "hook before": _hook_before,
    "hook that keeps": _hook_that_keeps,
    "counter": _counter,
}


def _off(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@settings(max_examples=16)
@given(
    change=st.sampled_from(list(CHANGES)),
    layer=st.sampled_from(["conv", "norm", "gate", "out", ""]),
    branches=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_changed_layer_is_right_or_refused(change: str, layer: str, branches: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = Block(branches).eval()
    if layer or change.startswith("hook that") or change == "counter":
        CHANGES[change](model.get_submodule(layer))
    data = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    wanted = copy.deepcopy(model).eval()(data[0])["out"] if change == "counter" else model(data[0])["out"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        found = bgd.quantize(model, data, CONFIG, progress=False).model
    except bgd.BGDError as error:
        assert "conv2d" not in str(error)
        return
    assert type(found) is Block
    assert _off(found(data[0])["out"], wanted) < 0.05
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("branches", [False, True])
def test_class_methods_types_state_and_pickle(branches: bool, tmp_path: Path) -> None:
    model, data = randomized(Block(branches)).train(), images(size=8)
    model.names = ("cat", "dog")
    result = bgd.quantize(model, data, CONFIG, progress=False)
    found = result.model
    assert any("running the network itself" in note for note in result.report.notes) == branches
    assert type(found) is Block
    assert found.names == model.names
    assert found.training
    assert int(found.calls) == 0
    found.eval()
    assert type(found(data[0])) is collections.OrderedDict
    assert found.predict(data[0]).shape == (len(data[0]),)
    quantized = {layer.name for layer in result.report.layers}
    kept = {name for name in model.state_dict() if name.removesuffix(".weight") not in quantized}
    assert kept <= set(found.state_dict())
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again(data[0], raw=True), found(data[0], raw=True))
    bgd.save(found, tmp_path / "net")
    loaded = bgd.load(tmp_path / "net", like=Block(branches).eval())
    assert type(loaded) is Block
    assert torch.equal(loaded(data[0], raw=True), found(data[0], raw=True))


@pytest.mark.parametrize("given", [{}, {"raw": True}, {"scale": True}, {"scale": True, "raw": True}])
def test_arguments_that_are_given_or_not(given: dict[str, Any]) -> None:
    model = randomized(Block(branches=False)).eval()
    scale = {"scale": torch.rand(16, 1, 1)} if given.get("scale") else {}
    data = [{"x": x, **{k: v for k, v in given.items() if k != "scale"}, **scale} for x in images(size=8)]
    result = bgd.quantize(model, data, CONFIG, progress=False)
    assert not any("running the network itself" in note for note in result.report.notes)
    found, wanted = (net(**data[0]) for net in (result.model, model))
    assert _off(*((x if given.get("raw") else x["out"]) for x in (found, wanted))) < 0.05


class Tables(nn.Module):
    """Tensors that no state dict has: small and large ones, plain and as buffers that are not persistent."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 32), nn.Linear(32, 8)
        self.plain = torch.full((32,), value)
        self.register_buffer("small", torch.full((32,), value), persistent=False)
        self.register_buffer("large", torch.full((8, 8000), 1.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x)) * self.plain + self.small
        return self.b(y) * self.large.mean()


def test_tensors_outside_of_the_state_are_stored_or_refused(tmp_path: Path) -> None:
    model, data = Tables(2.0).eval(), vectors()
    found = bgd.quantize(model, data, em(), progress=False).model
    size = bgd.save(found, tmp_path / "net")
    assert size < 8 * 8000
    assert torch.equal(bgd.load(tmp_path / "net", like=Tables(5.0).eval())(data[0]), found(data[0]))
    other = Tables(2.0).eval()
    other.large.mul_(3)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="'large': the file holds only a fingerprint"):
        bgd.load(tmp_path / "net", like=other)


def test_a_graph_that_is_not_the_whole_network_is_refused() -> None:
    graph = fx.symbolic_trace(randomized(SmallResNet()).eval())
    graph.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(TraceError, match=r"the network does more than its graph: .*remove it"):
        bgd.quantize(graph, images(), em(), progress=False)


class _Counting(nn.Module):
    """Writes to a buffer at every run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(12, 64), nn.Linear(64, 64)
        self.register_buffer("table", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        self.table.add_(x.detach().mean())  # type: ignore[operator]
        return self.last(torch.tanh(x))


def test_buffers_that_a_run_writes_are_as_they_came() -> None:
    model = _Counting().eval()
    result = bgd.quantize(model, vectors(5), em(), progress=False).model
    assert torch.equal(result.table, model.table) and not model.table.any()  # type: ignore[arg-type,operator]


def test_a_class_that_cannot_be_imported_is_pickled_as_its_graph() -> None:
    class Local(nn.Sequential):
        pass

    model = Local(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 32)).eval()
    result = bgd.quantize(model, vectors(), em(), progress=False).model
    assert type(result) is Local
    again = pickle.loads(pickle.dumps(result))
    assert all(torch.equal(again(x), result(x)) for x in vectors())


def test_position_tables_stay_exact() -> None:
    class Positions(PlainNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", 1e4 ** (-torch.arange(12) / 12))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.cos(1000 * self.table))  # type: ignore[operator]

    model = Positions().eval()
    found = bgd.quantize(model, vectors(), em(float_storage="float16"), progress=False).model
    assert torch.equal(found.table, model.table)


def test_data_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bgd_plugin.calibration.batches._MOST_BATCHES", 5)
    with pytest.raises(CalibrationError, match=r"has no length and gave more than 5 batches.*islice"):
        bgd.quantize(PlainNet(), itertools.repeat(vectors()[0]), em(), progress=False)


@pytest.mark.parametrize("layer", [nn.Linear(12, 32), nn.Conv2d(3, 16, 3), nn.ConvTranspose2d(4, 32, 3, groups=2)])
def test_a_network_that_is_one_layer(layer: nn.Module, tmp_path: Path) -> None:
    setting = LayerConfig(block_size=1, codebook_size=64)
    config = em(linear=setting, conv=setting, pointwise_conv=setting, first_layer=setting)
    shape = {"Linear": (4, 12), "Conv2d": (4, 3, 8, 8), "ConvTranspose2d": (4, 4, 8, 8)}[type(layer).__name__]
    data = [torch.randn(shape) for _ in range(2)]
    found = bgd.quantize(layer.eval(), data, config, progress=False).model
    assert isinstance(found, type(layer))
    assert 0 < _off(found(data[0]), layer(data[0])) < 0.1
    bgd.save(found, tmp_path / "net")
    assert torch.equal(bgd.load(tmp_path / "net", like=layer)(data[0]), found(data[0]))


def test_dropout_as_a_function_drops_in_training_alone() -> None:
    class Dropping(PlainNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.dropout(x, 0.5, self.training))

    found = bgd.quantize(Dropping().eval(), vectors(), em(), progress=False).model
    x = vectors()[0]
    assert torch.equal(found(x), found(x))
    found.train()
    assert not torch.equal(found(x), found(x))
