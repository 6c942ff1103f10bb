"""Whether a shift of the bias helps: the decision is the literal one, on samples that the shift was not made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bgd_plugin.calibration import CollectedInputs
from bgd_plugin.correction import bias
from bgd_plugin.correction.bias import shift_helps
from bgd_plugin.pq.blocks import Geometry

LINEAR = Geometry.linear()


def _inputs(student: Sequence[Tensor], reference: Sequence[Tensor], geometry: Geometry = LINEAR) -> CollectedInputs:
    mine, theirs = ([[(x, geometry)] for x in values] for values in (student, reference))
    return CollectedInputs("layer", mine, theirs)


def _helps(inputs: CollectedInputs, weight: Tensor, decoded: Tensor, drift: Callable[[int], Tensor] | None) -> bool:
    return shift_helps(weight, decoded, inputs, torch.Generator().manual_seed(0), drift)


@pytest.mark.parametrize("last", [1.0, -1.0])
def test_a_shift_is_judged_on_other_samples(last: float) -> None:
    reference = [torch.randn(64, 8) for _ in range(5)]
    student = [x - 0.5 * (last if i == 4 else 1.0) for i, x in enumerate(reference)]
    weight = torch.eye(8)
    assert _helps(_inputs(student, reference), weight, weight, None) == (last > 0)


@pytest.mark.parametrize(("tried", "judged", "expected"), [(0.9, -0.9, False), (-0.9, 0.9, True)])
def test_what_the_layer_is_to_compensate_for_counts_as_error(tried: float, judged: float, expected: bool) -> None:
    """An error of 1 everywhere, and a drift that makes it 1.9 and 0.1, or 0.1 and 1.9."""
    reference = [torch.randn(32, 4) for _ in range(5)]
    inputs = _inputs([x - 1 for x in reference], reference)
    drift = [torch.full((32, 4), judged if i == 4 else tried) for i in range(5)]
    assert _helps(inputs, torch.eye(4), torch.eye(4), drift.__getitem__) == expected


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("has_drift", [False, True])
def test_the_decision_is_the_literal_one(groups: int, has_drift: bool) -> None:
    """Pieces of other sizes, some with more samples than others, in a convolution with or without groups."""
    decisions = []
    for seed in range(16):
        torch.manual_seed(seed)
        sizes = [1, 2, 3, 4, 5, 9]
        reference = [torch.randn(size, 4, 6) for size in sizes]
        student = [x + 0.3 * torch.randn(4)[None, :, None] for x in reference]
        weight, drifts = torch.randn(6, 4 // groups, 1), [torch.randn(size, 6, 6) * has_drift for size in sizes]
        decoded = weight + 0.1 * torch.randn_like(weight)
        mine, theirs = (
            [torch.nn.functional.conv1d(x, w, groups=groups).double() for x in values]
            for values, w in ((student, decoded), (reference, weight))
        )
        errors = [t - m + d for t, m, d in zip(theirs, mine, drifts, strict=True)]
        mean = torch.cat(errors[:5]).mean((0, 2))
        judged = errors[5].mean((0, 2))
        expected = bool((judged - mean).square().sum() <= judged.square().sum())
        inputs = _inputs(student, reference, Geometry.of((1,), 1, 0, 1, groups))
        assert _helps(inputs, weight, decoded, drifts.__getitem__ if has_drift else None) == expected, seed
        decisions.append(expected)
    assert len(set(decisions)) == 2


def test_errors_are_summed_in_double_precision_and_over_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors of a million, with a sign; another process has a mean of the judges that turns the decision."""
    seen: list[Tensor] = []

    def shared(tensors: list[Tensor]) -> None:
        seen.extend(tensor.clone() for tensor in tensors)
        tensors[0][1] = -1e9

    reference = [1e6 * torch.randn(100, 4) for _ in range(5)]
    student = [x - 1e6 * torch.randn(100, 4) - 5e5 for x in reference]
    errors = [(theirs - mine).double() for mine, theirs in zip(student, reference, strict=True)]
    expected = torch.stack([torch.cat(errors[:4]).sum(0), errors[4].sum(0)])
    inputs = _inputs(student, reference)
    assert _helps(inputs, torch.eye(4), torch.eye(4), None)
    monkeypatch.setattr(bias, "sum_", shared)
    assert not _helps(inputs, torch.eye(4), torch.eye(4), None)
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=0)
    assert torch.equal(seen[1], torch.tensor([[400.0], [100.0]], dtype=torch.float64))


@pytest.mark.parametrize(("tried", "expected"), [(1.5, True), (1.9, True), (2.1, False), (-0.1, False)])
def test_one_sample_judges_as_a_whole(tried: float, expected: bool) -> None:
    """A mean error of less than twice what is judged lowers it."""
    reference = [torch.randn(1, 4) for _ in range(5)]
    student = [x - (1.0 if i == 4 else tried) for i, x in enumerate(reference)]
    assert _helps(_inputs(student, reference), torch.eye(4), torch.eye(4), None) == expected
