"""The answer check, against its definition."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bgd_plugin.calibration import Batch
from bgd_plugin.planning import answers as answers_module
from bgd_plugin.planning.answers import compare_answers


def _compare(found: Any, exact: Any, sizes: list[int], mask: Tensor | None = None) -> Any:
    """Two functions of the input as networks, on batches that hold the samples' numbers."""
    numbers = torch.arange(sum(sizes)).split(sizes)
    batches = [Batch((n,), {} if mask is None else {"attention_mask": mask[n]}) for n in numbers]
    return compare_answers(lambda b: found(b.args[0]), lambda b: exact(b.args[0]), batches, kept_aside=True)


def test_logits() -> None:
    one, other = torch.randn(7, 5), torch.randn(7, 5)
    p, q = other.softmax(1), one.softmax(1)
    kl = float((p * (p / q).log()).sum(1).mean())
    answers = _compare(lambda n: one[n], lambda n: other[n], [3, 4])
    assert answers.measure == "KL divergence"
    assert math.isclose(answers.divergence, kl, rel_tol=1e-5)
    assert math.isclose(answers.agreement, float((one.argmax(1) == other.argmax(1)).float().mean()), rel_tol=1e-6)
    assert answers.samples == 7
    assert "kept aside" in str(answers)


def test_tokens_that_do_not_count_are_left_out() -> None:
    one, other = torch.randn(4, 6, 5), torch.randn(4, 6, 5)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    answers = _compare(lambda n: SimpleNamespace(logits=one[n]), lambda n: SimpleNamespace(logits=other[n]), [4], mask)
    p, q = F.log_softmax(other[:, :4], -1), F.log_softmax(one[:, :4], -1)
    assert math.isclose(answers.divergence, float((p.exp() * (p - q)).sum(-1).mean()), rel_tol=1e-5)
    assert math.isclose(
        answers.agreement, float((one[:, :4].argmax(-1) == other[:, :4].argmax(-1)).float().mean()), rel_tol=1e-6
    )


@pytest.mark.parametrize(("tokens", "samples"), [(1, 4), (20, 4), (25, 6), (1000, 10)])
def test_enough_tokens_of_four_texts_or_more(tokens: int, samples: int) -> None:
    """Six of each text; images, and maps of pixels, are compared all the same."""
    for shape, found in (((10, 6, 5), samples), ((10, 5), 10), ((10, 5, 6, 6), 10)):
        one, other = torch.randn(shape), torch.randn(shape)
        batches = [Batch((numbers,), {}) for numbers in torch.arange(10).split(2)]
        answers = compare_answers(
            lambda b, one=one: SimpleNamespace(logits=one[b.args[0]]),
            lambda b, other=other: SimpleNamespace(logits=other[b.args[0]]),
            batches,
            kept_aside=False,
            enough_tokens=tokens,
        )
        assert answers.samples == found and answers.measure == "KL divergence"


def test_an_output_without_logits_by_relative_error() -> None:
    boxes = torch.randn(5, 3, 4)
    answers = _compare(lambda n: [boxes[n] * 1.1, n], lambda n: [boxes[n], n], [2, 3])
    assert answers.measure == "relative squared error"
    assert answers.agreement is None
    assert math.isclose(answers.divergence, 0.01, rel_tol=1e-4)


def test_answers_that_are_not_finite_are_infinitely_far() -> None:
    one = torch.full((2, 3), float("nan"))
    assert _compare(lambda n: one[n], lambda n: torch.zeros(2, 3)[n], [2]).divergence == math.inf


@pytest.mark.parametrize(("loss", "expected"), [(-1e-9, 0.0), (0.25, 0.25), (float("nan"), math.inf)])
def test_rounding_below_zero_is_no_divergence(loss: float, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers_module, "kl_to_teacher", lambda *_: torch.tensor(loss))
    one = torch.randn(4, 5)
    assert _compare(lambda n: one[n], lambda n: one[n], [2, 2]).divergence == expected
    assert answers_module.output_loss(one, one) == (expected, "KL")


def test_of_maps_of_logits_every_pixel_counts() -> None:
    one, other = torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    answers = _compare(lambda n: {"logits": one[n]}, lambda n: {"logits": other[n]}, [3, 1])
    assert answers.agreement == pytest.approx(float((one.argmax(1) == other.argmax(1)).double().mean()))


def test_one_output_without_logits_makes_the_measure_another() -> None:
    one = torch.randn(4, 5)

    def exact(numbers: Tensor) -> Tensor:
        return one[numbers] if int(numbers[0]) else one[numbers, :1]

    answers = _compare(lambda n: 0.9 * exact(n), exact, [2, 2])
    assert answers.measure == "relative squared error" and answers.agreement is None
    assert answers.divergence == pytest.approx(0.01, rel=1e-4)


def test_only_rows_of_several_classes_are_logits() -> None:
    assert answers_module.has_logits(torch.zeros(4, 2)) and answers_module.has_logits({"logits": torch.zeros(4, 3, 2)})
    for other in (
        torch.zeros(4, 1),
        torch.zeros(4),
        torch.zeros(4, 5, 6),
        torch.zeros(4, 5, 6, 6),
        [torch.zeros(4, 2)],
    ):
        assert not answers_module.has_logits(other)
    assert not answers_module.has_logits(SimpleNamespace(logits=torch.zeros(4)))
    assert not answers_module.has_logits({"logits": None})


def test_logits_are_compared_by_squares_where_that_is_asked_for() -> None:
    one, other = torch.randn(4, 5), torch.randn(4, 5)
    loss, measure = answers_module.output_loss(one, other, "squared difference")
    assert loss == pytest.approx(float((one - other).square().sum() / other.square().sum()))
    assert measure == "relative squared difference of outputs"
    divergence, measure = answers_module.output_loss(one, other)
    p, q = other.log_softmax(1), one.log_softmax(1)
    assert measure == "KL" and divergence == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()))
    swapped = answers_module.output_loss(other, one)[0]
    assert swapped != pytest.approx(divergence, rel=1e-3)


def test_sums_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process with three times as many samples, all of them exact: every sum counts them."""
    exact, found = torch.randn(4, 5) * 9, torch.randn(4, 5) * 9
    batches = [Batch((torch.ones(4, 1),))]
    alone = compare_answers(lambda _: found, lambda _: exact, batches, kept_aside=True)
    monkeypatch.setattr(answers_module, "total", lambda number: 4 * number)
    assert compare_answers(lambda _: found, lambda _: exact, batches, kept_aside=True) == dataclasses.replace(
        alone, samples=16
    )
    monkeypatch.setattr(answers_module, "total", lambda number: number + 12)
    other = compare_answers(lambda _: found, lambda _: exact, batches, kept_aside=True)
    assert other.samples == 16 and other.divergence == pytest.approx((4 * alone.divergence + 12) / 16)
