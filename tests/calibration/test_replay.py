"""Decisions of one network that another follows, operator by operator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.calibration.replay import Recorder, Replayer

aten: Any = torch.ops.aten
ONE = torch.tensor([[1.0, 3.0, 2.0], [6.0, 5.0, 4.0]])
OTHER = torch.tensor([[10.0, 20.0, 30.0], [40.0, 50.0, 60.0]])

# operator, positional and keyword arguments behind the tensor
RANKINGS: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (aten.topk.default, (2,), {}),
    (aten.topk.default, (1, 0), {}),
    (aten.topk.default, (1,), {"dim": 0}),
    (aten.sort.default, (), {}),
    (aten.sort.default, (0, True), {}),
    (aten.sort.stable, (), {"stable": True, "dim": 0}),
    (aten.max.dim, (1,), {}),
    (aten.max.dim, (0, True), {}),
    (aten.min.dim, (-2,), {}),
]


def _recorded(*calls: tuple[Any, tuple[Any, ...]]) -> list[Any]:
    recorder = Recorder()
    for operator, args in calls:
        recorder.compute(operator, args, {})
    return recorder.decisions


@pytest.mark.parametrize(("operator", "args", "kwargs"), RANKINGS)
def test_a_ranking_keeps_its_positions_and_takes_the_values_there(operator: Any, args: Any, kwargs: Any) -> None:
    recorder = Recorder()
    wanted = recorder.compute(operator, (ONE, *args), kwargs)
    replayer = Replayer(recorder.decisions)
    found = replayer.compute(operator, (OTHER, *args), kwargs)
    assert not replayer.lost and type(found) is type(wanted)
    assert torch.equal(found[1], wanted[1])
    dim = args[-2] if operator is aten.sort.default and args else kwargs.get("dim", -1)
    dim = args[0] if operator in (aten.max.dim, aten.min.dim) else args[1] if len(args) == 2 and args[1] == 0 else dim
    places = found[1] if found[1].ndim == 2 else found[1].unsqueeze(dim)
    assert torch.equal(found[0], OTHER.gather(dim, places).reshape(found[0].shape))


def test_a_number_is_its_own_ranking() -> None:
    recorder = Recorder()
    recorder.compute(aten.sort.default, (torch.tensor(3.0),), {})
    found = Replayer(recorder.decisions).compute(aten.sort.default, (torch.tensor(7.0),), {})
    assert float(found[0]) == 7 and int(found[1]) == 0


@pytest.mark.parametrize("shape", [(3, 3), (2, 2)])
def test_positions_that_do_not_exist_end_the_replay(shape: tuple[int, int]) -> None:
    """Other rows than the recorded ones, or a place beyond the last column."""
    decisions = _recorded((aten.topk.default, (ONE, 2)))
    decisions[0][1][0].fill_(2)
    replayer = Replayer(decisions)
    x = torch.arange(float(shape[0] * shape[1])).reshape(shape)
    assert torch.equal(replayer.compute(aten.topk.default, (x, 2), {})[1], x.topk(2)[1])
    assert replayer.lost


def test_comparisons_are_decisions_and_integers_of_integers_are_not() -> None:
    calls = [(aten.gt.Scalar, (ONE, 2.5)), (aten.gt.Scalar, (ONE.long(), 2)), (aten.mul.Tensor, (ONE, ONE))]
    decisions = _recorded(*calls)
    assert [operator for operator, _ in decisions] == [aten.gt.Scalar]
    replayer = Replayer(decisions)
    assert torch.equal(replayer.compute(aten.gt.Scalar, (ONE.long(), 2), {}), ONE > 2)
    assert torch.equal(replayer.compute(aten.gt.Scalar, (OTHER, 2.5), {}), ONE > 2.5)
    assert not replayer.lost


def test_what_is_written_in_place_is_no_decision() -> None:
    assert not _recorded((aten.copy_.default, (torch.zeros(2, 3, dtype=torch.long), ONE)))


def test_recorded_and_replayed_decisions_are_copies() -> None:
    recorder = Recorder()
    recorder.compute(aten.gt.Scalar, (ONE, 2.5), {}).fill_(False)
    recorder.compute(aten.sort.default, (ONE,), {})[1].zero_()
    for _ in range(2):
        replayer = Replayer(recorder.decisions)
        found: Tensor = replayer.compute(aten.gt.Scalar, (OTHER, 2.5), {})
        assert torch.equal(found, ONE > 2.5)
        found.fill_(True)
        places: Tensor = replayer.compute(aten.sort.default, (OTHER,), {})[1]
        assert torch.equal(places, ONE.sort()[1])
        places.zero_()


def test_another_operator_or_another_rank_ends_the_replay() -> None:
    for operator, x in ((aten.lt.Scalar, OTHER), (aten.gt.Scalar, OTHER[0])):
        replayer = Replayer(_recorded((aten.gt.Scalar, (ONE, 2.5)), (aten.gt.Scalar, (ONE, 2.5))))
        assert torch.equal(replayer.compute(operator, (x, 2.5), {}), operator(x, 2.5))
        assert replayer.lost
        assert bool(replayer.compute(aten.gt.Scalar, (OTHER, 2.5), {}).all())  # decided by itself from then on


def test_more_decisions_than_recorded_end_the_replay() -> None:
    replayer = Replayer([])
    assert bool(replayer.compute(aten.gt.Scalar, (OTHER, 2.5), {}).all()) and replayer.lost


def test_skipping_goes_forward_only() -> None:
    replayer = Replayer(_recorded((aten.lt.Scalar, (ONE, 2.5)), (aten.gt.Scalar, (ONE, 2.5))))
    replayer.skip_to(1)
    replayer.skip_to(0)
    assert torch.equal(replayer.compute(aten.gt.Scalar, (OTHER, 2.5), {}), ONE > 2.5) and not replayer.lost
