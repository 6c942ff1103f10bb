"""The answer check, against its definition."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bgd_plugin.calibration import Batch
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


def test_an_output_without_logits_by_relative_error() -> None:
    boxes = torch.randn(5, 3, 4)
    answers = _compare(lambda n: [boxes[n] * 1.1, n], lambda n: [boxes[n], n], [2, 3])
    assert answers.measure == "relative squared error"
    assert answers.agreement is None
    assert math.isclose(answers.divergence, 0.01, rel_tol=1e-4)


def test_answers_that_are_not_finite_are_infinitely_far() -> None:
    one = torch.full((2, 3), float("nan"))
    assert _compare(lambda n: one[n], lambda n: torch.zeros(2, 3)[n], [2]).divergence == math.inf
