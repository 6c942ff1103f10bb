"""A batch whose values nobody asks for lags behind, and comes to the same values when somebody does."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch, Batches, LayerInputs, Walk
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module, trace
from tests.calibration.test_live_values import NETWORKS
from tests.networks import randomized

COUNT = 5


def _walk(model: nn.Module, data: list[Tensor], *, with_reference: bool = True) -> tuple[Walk, Any]:
    student: Any = trace(model)
    reference: Any = copy_module(student, share_tensors=True)
    return Walk(student, Batches.of([Batch((x,)) for x in data]), reference if with_reference else None), reference


def _change(walk: Walk, target: str) -> None:
    new = copy.deepcopy(walk.student.get_submodule(target))
    new.weight.data.mul_(-1.5)
    setattr(walk.student, target, new)
    walk.mark_changed(target)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("asks", [(), (2,), (1, 3)])
@torch.no_grad()
def test_values_do_not_depend_on_when_they_are_asked_for(network: str, asks: tuple[int, ...]) -> None:
    kind, data, first, second = NETWORKS[network]
    data = [data[0] + 0.1 * number for number in range(COUNT)]
    walk, reference = _walk(randomized(kind()), data)
    for place, node in enumerate(walk.nodes()):
        for batch in asks:
            if place % (batch + 1) == 0:
                _ = walk.student_values[batch]
        if node.target in (first, second):
            _change(walk, str(node.target))
    student = [walk.finish(batch) for batch in range(COUNT)]
    for batch, x in enumerate(data):
        assert torch.equal(student[batch], walk.student(x.clone()))
        mine, theirs = walk.student_values[batch], walk.reference_values[batch]
        for found, model in ((mine, walk.student), (theirs, reference)):
            (output,) = (value for name, value in found.items() if name == str(walk.order[-1].args[0]))
            assert torch.equal(output, model(x.clone()))


def test_only_batches_that_are_asked_for_run_and_each_once() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(2, 2), nn.Identity())
    walk, _ = _walk(model, [torch.full((1, 2), float(number)) for number in range(COUNT)], with_reference=False)
    counted: list[list[float]] = [[], []]
    for calls, name in zip(counted, ("0", "2"), strict=True):
        walk.student.get_submodule(name).register_forward_hook(
            lambda _, inputs, __, calls=calls: calls.append(float(inputs[0].flatten()[0]))
        )
    nodes = walk.nodes()
    next(nodes)
    assert counted[0] == []
    next(nodes)
    assert counted[0] == [0.0]  # the first batch shows what differs
    _ = walk.student_values[3]
    _ = walk.student_values[3]
    assert counted[0] == [0.0, 3.0] and counted[1] == []
    for _ in nodes:
        pass
    assert sorted(counted[0]) == [0.0, 1.0, 2.0, 3.0, 4.0] and len(counted[1]) == COUNT


def test_a_batch_that_comes_later_is_checked_at_a_layer_that_others_showed() -> None:
    data = [torch.randn(4, 3, 12, 12) for _ in range(64)]
    data[2][1, 0, 3, 3] = math.nan
    walk, _ = _walk(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)), data)
    nodes = walk.nodes({"_0"})
    call = next(nodes)
    inputs = LayerInputs(walk, "body.0", [call.name]).some(4)
    assert len(inputs) == 16 and list(inputs.batches) == list(range(0, 64, 4))
    assert len(list(inputs.pairs())) == len(list(inputs)) == 16  # the bad one is not among them
    with pytest.raises(CalibrationError, match=r"layer 'body\.0': its inputs"):
        list(nodes)


def test_inputs_of_few_positions_of_several_calls_or_hidden_ones_are_all_taken() -> None:
    data = [torch.randn(4, 3, 12, 12) for _ in range(64)]
    walk, _ = _walk(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU()), data)
    call = next(walk.nodes({"_0"}))
    inputs = LayerInputs(walk, "0", [call.name])
    assert len(inputs.some(400)) == 64  # 36 positions after the stride: a sixteenth of them, of 256 samples, are 576
    assert len(inputs.some(200)) == 32  # 89 samples are enough
    assert len(inputs.some(100)) == 16  # 45 would be, but 64 are taken at the least
    twice = LayerInputs(walk, "0", [call.name, call.name])
    assert twice.some(4) is twice
    hidden = LayerInputs(walk, "0", [call.name], nn.Parameter(torch.ones(1)))
    assert hidden.some(4) is hidden
