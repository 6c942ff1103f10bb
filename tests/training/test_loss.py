"""The loss against its formula, and a codeword's gradient against the mean over its blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.errors import CalibrationError
from bgd_plugin.nn import PQModule, quantized
from bgd_plugin.training.loss import codebooks, kl_to_teacher, mean_gradients_


def _literal_kl(student: Tensor, teacher: Tensor) -> float:
    """Σ_c p_c log(p_c / q_c), averaged over the rows of `[n, classes]`."""
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    return float((p * (p / q).log()).sum(1).mean())


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5), (2, 5, 3, 4)])
def test_it_is_the_divergence_from_teacher_to_student(shape: tuple[int, ...]) -> None:
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [t.movedim(1, -1) if len(shape) == 4 else t for t in (student, teacher)]
    expected = _literal_kl(*(t.reshape(-1, 5) for t in rows))
    assert float(kl_to_teacher(student, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(kl_to_teacher(teacher, student)) != pytest.approx(expected, rel=1e-2)


def test_only_the_tokens_that_count_are_averaged() -> None:
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    tokens = torch.tensor([[True, True, False], [True, False, False]])
    expected = _literal_kl(student[tokens], teacher[tokens])
    assert float(kl_to_teacher(student, teacher, tokens)) == pytest.approx(expected, rel=1e-5)
    student.requires_grad_(True)
    kl_to_teacher(student, teacher, tokens).backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert not student.grad[~tokens].any()
    assert bool(student.grad[tokens].any())


def test_equal_logits_have_no_loss() -> None:
    x = torch.randn(4, 5)
    assert float(kl_to_teacher(x, x + 3.0)) == pytest.approx(0, abs=1e-6)


def test_a_teacher_with_other_outputs_is_told_apart_by_its_shapes() -> None:
    expected = r"the teacher's logits have shape \[4, 7\], the network's \[4, 5\]: give a teacher with"
    with pytest.raises(CalibrationError, match=expected):
        kl_to_teacher(torch.zeros(4, 5), torch.zeros(4, 7))


def _layer() -> tuple[PQModule, nn.Linear]:
    codes = torch.tensor([[0, 1], [1, 1], [0, 3]])  # codeword 2 has no block
    layer = quantized(nn.Linear(4, 3), torch.randn(4, 2), codes)
    dense = nn.Linear(4, 3)
    dense.weight.data, dense.bias = layer.weight.detach().clone(), layer.bias
    return layer, dense


def test_a_codewords_gradient_is_the_mean_over_its_blocks() -> None:
    layer, dense = _layer()
    x = torch.randn(5, 4)
    layer(x).square().sum().backward()
    dense(x).square().sum().backward()
    mean_gradients_([layer])
    blocks = dense.weight.grad.reshape(3, 2, 2)
    for code in (0, 1, 3):
        torch.testing.assert_close(layer.codebook.grad[code], blocks[layer.codes == code].mean(0))
    assert not layer.codebook.grad[2].any()


def test_a_layer_without_a_gradient_is_passed_over() -> None:
    layer, _ = _layer()
    mean_gradients_([layer])
    assert layer.codebook.grad is None


def test_a_shared_layer_is_counted_once() -> None:
    layer, _ = _layer()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert codebooks([*model.modules(), layer]) == [layer]
