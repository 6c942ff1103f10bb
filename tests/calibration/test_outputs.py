"""The float network's outputs are taken from its own run where they are those of inputs and weight alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import bgd_plugin as bgd
from bgd_plugin.calibration import Batch, LayerInputs, Walk, paired_pieces
from bgd_plugin.graph import copy_module


class _Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class _Net(nn.Module):
    def __init__(self, layer: nn.Module | None = None, calls: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.act = nn.ReLU(inplace=True)
        self.layer = nn.Conv2d(8, 8, 3, padding=1, stride=2, groups=2, bias=False) if layer is None else layer
        self.last = nn.Conv2d(8, 4, 1, bias=False)
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for _ in range(self.calls):
            x = self.act(self.layer(x.to(self.layer.weight.dtype)))  # type: ignore[arg-type, union-attr]
        return self.last(x.float())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, _Net)


def _walk(model: nn.Module) -> Walk:
    """With a first layer that differs, at the layer."""
    torch.manual_seed(1)
    reference = fx.GraphModule(model.eval(), _Tracer().trace(model))
    student = copy_module(reference)
    student.first.weight.data *= 1.1
    walk = Walk(student, [Batch((torch.randn(2, 3, 10, 10),)) for _ in range(3)], reference)
    walk.mark_changed("first")
    nodes = walk.nodes(["layer"])
    next(nodes)
    walk.rest = nodes  # type: ignore[attr-defined]
    return walk


@torch.no_grad()
def test_they_are_those_of_the_float_networks_inputs() -> None:
    walk = _walk(_Net())
    inputs = LayerInputs(walk, "layer", ["layer"])
    assert inputs.outputs is not None and walk.reference is not None
    weight = walk.reference.layer.weight.reshape(2, 4, -1)
    for rows in (30, 10**6):
        pieces = [
            paired_pieces(inputs, rows, torch.Generator().manual_seed(3), None, None, f) for f in (None, inputs.outputs)
        ]
        for plain, given in zip(*pieces, strict=True):
            assert torch.equal(plain.student, given.student)
            torch.testing.assert_close(plain.reference @ weight.mT, given.reference, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_layer_runs_once_all_the_same_and_what_follows_gets_its_values() -> None:
    model = _Net()
    walk = _walk(model)
    runs: Counter[str] = Counter()
    conv: Any = nn.Conv2d.forward
    inputs = LayerInputs(walk, "layer", ["layer"])
    assert inputs.outputs is not None and walk.reference is not None
    reference: Any = walk.reference
    counted = reference.layer._conv_forward
    reference.layer._conv_forward = lambda *given: (runs.update(["layer"]), counted(*given))[1]
    for batch in (0, 0, 1):
        inputs.outputs(batch)
    walk.mark_changed("layer")
    walk.student.layer.weight.data *= 1.2  # type: ignore[union-attr, operator]
    for _ in walk.rest:  # type: ignore[attr-defined]
        pass
    assert runs["layer"] == 3 and conv is nn.Conv2d.forward
    for batch in range(3):
        x = walk._given[batch]["x"]
        torch.testing.assert_close(walk.student_values[batch]["last"], walk.student(x))
        torch.testing.assert_close(walk.reference_values[batch]["last"], walk.reference(x))


OTHERS = {
    "a bias": lambda: _Net(nn.Conv2d(8, 8, 1)),
    "a class of its own": lambda: _Net(_Doubled(8, 8, 1, bias=False)),
    "half precision": lambda: _Net(nn.Conv2d(8, 8, 1, bias=False).to(torch.bfloat16)),
    "several calls": lambda: _Net(nn.Conv2d(8, 8, 1, bias=False), calls=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_outputs_are_computed_from_the_inputs(name: str) -> None:
    walk = _walk(OTHERS[name]())
    calls = ["layer", "layer_1"] if name == "several calls" else ["layer"]
    assert LayerInputs(walk, "layer", calls).outputs is None


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_outputs_that_hooks_may_change_are_not_taken(kind: str) -> None:
    walk = _walk(_Net())
    getattr(walk.reference.layer, kind)(lambda *given: None)  # type: ignore[union-attr]
    assert LayerInputs(walk, "layer", ["layer"]).outputs is None
    assert LayerInputs(_walk(_Net()), "last", ["last"]).outputs is None  # not there yet


def test_a_fit_is_the_same_with_and_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = _Net(nn.Conv2d(8, 16, 3, padding=1, bias=False)).eval()
    model.last = nn.Conv2d(16, 4, 1, bias=False)
    data = [torch.randn(16, 3, 10, 10) for _ in range(4)]
    coarse, fine = (bgd.LayerConfig(block_size=size, codebook_size=8) for size in (9, 4))
    config = bgd.BGDConfig(first_layer=coarse, conv=coarse, pointwise_conv=fine, max_divergence=None)
    taken: Counter[str] = Counter()
    output = Walk.reference_output
    monkeypatch.setattr(Walk, "reference_output", lambda walk, *given: (taken.update(["it"]), output(walk, *given))[1])
    results = [bgd.quantize(model, data, config, progress=False)]
    assert taken["it"] > 0
    monkeypatch.setattr(LayerInputs, "outputs", None)
    results.append(bgd.quantize(model, data, config, progress=False))
    with torch.no_grad():
        for x in data:
            torch.testing.assert_close(*(result.model(x) for result in results), rtol=1e-3, atol=1e-3)
