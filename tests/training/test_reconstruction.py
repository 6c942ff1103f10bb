"""Block-wise reconstruction: blocks come nearer to the float blocks, on samples kept aside, and nothing else moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bgd_plugin as bgd
from bgd_plugin import ReconstructionConfig
from bgd_plugin.calibration import Batch
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module, swap_, trace
from bgd_plugin.support.steps import Steps
from bgd_plugin.training import reconstruct_, reconstruction_steps
from bgd_plugin.training.loss import kl_to_teacher
from tests.networks import SmallResNet, em, images, randomized


def _students(data: list[Tensor]) -> tuple[Any, Any]:
    """A student, and its float twin with tensors of its own."""
    model = randomized(SmallResNet()).eval()
    student = trace(bgd.quantize(model, data, em(batchnorm="matched"), progress=False).model).requires_grad_(False)
    return student, bgd.materialize(_float_twin(student, model))


def _float_twin(student: Any, model: nn.Module) -> Any:
    twin = trace(copy_module(student))
    for layer in ("conv1", "conv2", "down", "fc"):
        swap_(twin, layer, copy_module(model.get_submodule(layer)))
    for norm in ("bn1", "bn2", "bn3"):
        swap_(twin, norm, copy_module(model.get_submodule(norm)))
    return twin.eval()


def _reconstruct(student: Any, reference: Any, data: list[Tensor], config: ReconstructionConfig) -> Any:
    return reconstruct_(
        student, reference, [Batch((x,)) for x in data], config, lambda _: torch.Generator().manual_seed(0)
    )


@torch.no_grad()
def _distance(student: nn.Module, reference: nn.Module, data: list[Tensor]) -> float:
    return sum(float(kl_to_teacher(student(x), reference(x))) for x in data)


def test_the_network_comes_nearer_on_samples_it_has_not_seen() -> None:
    data = images(12)
    student, reference = _students(data[:10])
    before = _distance(student, reference, data[10:])
    gain = _reconstruct(student, reference, data[:10], ReconstructionConfig(steps=60, learning_rate=0.01))
    assert gain.after < gain.before
    assert _distance(student, reference, data[10:]) < before


def test_codes_statistics_and_the_reference_do_not_move() -> None:
    data = images(4)
    student, reference = _students(data)
    states = [{n: t.clone() for n, t in net.state_dict().items()} for net in (student, reference)]
    _reconstruct(student, reference, data, ReconstructionConfig(steps=20, learning_rate=0.01))
    moved = {n for n, t in student.state_dict().items() if not torch.equal(t, states[0][n])}
    assert any(name.endswith(".codebook") for name in moved)
    assert not any(name.endswith((".codes", "running_mean", "running_var")) for name in moved)
    assert all(torch.equal(t, states[1][n]) for n, t in reference.state_dict().items())


def test_a_block_that_gets_worse_is_put_back() -> None:
    data = images(4)
    student, reference = _students(data)
    before = {n: t.clone() for n, t in student.state_dict().items()}
    gain = _reconstruct(student, reference, data, ReconstructionConfig(steps=2, learning_rate=50.0))
    assert gain.taken_back == gain.blocks
    assert gain.after == gain.before
    assert all(torch.equal(t, before[n]) for n, t in student.state_dict().items())


def test_a_loss_that_is_not_finite_says_what_to_do() -> None:
    data = images(3)
    student, reference = _students(data)
    with pytest.raises(CalibrationError, match="lower learning_rate=1e"):
        _reconstruct(student, reference, data, ReconstructionConfig(steps=30, learning_rate=1e30))


def test_steps_are_those_that_will_be_taken() -> None:
    data = images(3)
    student, reference = _students(data)
    taken: list[int] = []
    config = ReconstructionConfig(steps=3, batch_size=2)
    batches = [Batch((x,)) for x in data]
    reconstruct_(student, reference, batches, config, lambda _: torch.Generator(), lambda _: Steps(None, taken.append))
    layers = ["conv1", "conv2", "down", "fc"]
    assert len(taken) == reconstruction_steps(student, layers, config) > 3


def test_one_setting_turns_it_on_and_the_report_says_what_it_gained() -> None:
    model, data = randomized(SmallResNet()).eval(), images(6)
    config = em(batchnorm="matched", reconstruction=ReconstructionConfig(steps=30))
    one, two = (bgd.quantize(model, data, config, progress=False) for _ in range(2))
    assert any(note.startswith("reconstruction: ") for note in one.report.notes)
    assert all(
        torch.equal(a, b) for a, b in zip(one.model.state_dict().values(), two.model.state_dict().values(), strict=True)
    )


def test_tied_parameters_stay_tied() -> None:
    """Two norms share their factor: training must move it for both."""
    data = images(4)
    student, reference = _students(data)
    student.get_submodule("bn3").weight = student.get_submodule("bn2").weight
    before = student.get_submodule("bn2").weight.clone()
    _reconstruct(student, reference, data, ReconstructionConfig(steps=10, learning_rate=0.01))
    assert student.get_submodule("bn3").weight is student.get_submodule("bn2").weight
    assert not torch.equal(student.get_submodule("bn2").weight, before)
