"""Distillation of one layer: its codebook moves towards the teacher, and nothing else does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin import DistillationConfig
from bgd_plugin.calibration import Batch, Walk
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import trace
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.support.steps import Steps
from bgd_plugin.training import distill_, kl_to_teacher
from tests.networks import PlainNet, vectors

CONFIG = DistillationConfig(steps=30, batch_size=16, learning_rate=0.2)


def _setting(data: list[Tensor]) -> tuple[Walk, PQModule, list[Tensor]]:
    """A network whose middle layer has a rough codebook, the walk standing there, and the float network's logits."""
    model = PlainNet().eval()
    with torch.no_grad():
        logits = [model(batch) for batch in data]
    student: Any = trace(model).requires_grad_(False)
    walk = Walk(student, [Batch((batch,)) for batch in data])
    for node in walk.nodes():
        if node.target == "2":
            codes = torch.randint(0, 16, (32, 8))
            blocks = student.get_submodule("2").weight.reshape(-1, 4)
            codebook = torch.stack([blocks[codes.flatten() == code].mean(0) for code in range(16)])
            layer = quantized(student.get_submodule("2"), codebook, codes)
            setattr(student, "2", layer)
            return walk, layer, logits
    raise AssertionError


def _loss(walk: Walk, logits: list[Tensor]) -> float:
    with torch.no_grad():
        return sum(float(kl_to_teacher(walk.finish(i), target)) for i, target in enumerate(logits))


def _distill(walk: Walk, layer: PQModule, logits: list[Tensor], config: Any = CONFIG, seed: int = 0) -> list[int]:
    steps: list[int] = []
    distill_(walk, layer, logits, config, torch.Generator().manual_seed(seed), Steps(on_steps=steps.append))
    return steps


def test_the_loss_falls() -> None:
    walk, layer, logits = _setting(vectors(4))
    before = _loss(walk, logits)
    _distill(walk, layer, logits)
    assert _loss(walk, logits) < 0.7 * before


def test_only_this_layers_codebook_moves() -> None:
    walk, layer, logits = _setting(vectors(4))
    before = {name: value.clone() for name, value in walk.student.state_dict().items()}
    _distill(walk, layer, logits)
    moved = [name for name, value in walk.student.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == ["2.codebook"]


def test_nothing_else_gets_a_gradient() -> None:
    walk, layer, logits = _setting(vectors(4))
    _distill(walk, layer, logits)
    assert [name for name, p in walk.student.named_parameters() if p.grad is not None] in ([], ["2.codebook"])


def test_it_makes_as_many_steps_as_asked() -> None:
    walk, layer, logits = _setting(vectors(4))
    assert len(_distill(walk, layer, logits, DistillationConfig(steps=7, batch_size=8))) == 7


def test_one_step_is_that_of_sgd_on_the_mean_gradient() -> None:
    """C − lr · (mean over the codeword's blocks of ∂KL/∂v), on all of the data."""
    data = vectors(2)
    walk, layer, logits = _setting(data)
    start = layer.codebook.detach().clone()
    weight = layer.weight.detach().clone().requires_grad_(True)
    below = walk.student.get_submodule("0")(torch.cat(data)).relu()
    output = walk.student.get_submodule("4")(torch.relu(below @ weight.T + layer.bias))
    kl_to_teacher(output, torch.cat(logits)).backward()
    blocks = weight.grad.reshape(32, 8, 4)
    _distill(walk, layer, logits, DistillationConfig(steps=1, batch_size=16, learning_rate=0.5, weight_decay=0.0))
    expected = torch.stack([start[c] - 0.5 * blocks[layer.codes == c].mean(0) for c in range(16)])
    torch.testing.assert_close(layer.codebook.detach(), expected, rtol=1e-3, atol=1e-5)


def test_only_the_part_from_the_layer_on_runs() -> None:
    walk, layer, logits = _setting(vectors(4))
    assert all(walk.student_values)  # all batches have come to the layer
    calls: list[str] = []
    for name in ("0", "4"):
        walk.student.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    _distill(walk, layer, logits, DistillationConfig(steps=3, batch_size=8))
    assert calls == ["4"] * 3


def test_batches_are_added_up_to_the_batch_size() -> None:
    walk, layer, logits = _setting(vectors(4, batch=8))
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    _distill(walk, layer, logits, DistillationConfig(steps=2, batch_size=24))
    assert len(calls) == 2 * 3


def test_the_same_seed_gives_the_same_codebook() -> None:
    results = []
    for _ in range(2):
        torch.manual_seed(5)
        walk, layer, logits = _setting(vectors(4))
        _distill(walk, layer, logits, DistillationConfig(steps=3, batch_size=8), seed=4)
        results.append(layer.codebook.detach().clone())
    assert torch.equal(*results)


def test_a_loss_that_is_not_finite_says_what_to_lower() -> None:
    walk, layer, logits = _setting(vectors(2))
    logits[0] = torch.full_like(logits[0], float("nan"))
    with pytest.raises(CalibrationError, match=r"distillation.*: the loss is nan; lower learning_rate=0\.2"):
        _distill(walk, layer, logits)


def test_a_teacher_with_other_outputs_is_refused() -> None:
    walk, layer, logits = _setting(vectors(2))
    with pytest.raises(CalibrationError, match=r"the teacher's logits have shape \[8, 4\], the network's \[8, 5\]"):
        _distill(walk, layer, [target[:, :4] for target in logits])


def test_the_layer_keeps_its_mode() -> None:
    walk, layer, logits = _setting(vectors(2))
    _distill(walk, layer, logits, DistillationConfig(steps=1))
    assert not any(module.training for module in walk.student.modules() if isinstance(module, nn.Module))
