"""What single runs leave behind: blocks, counts, inputs of both networks, and the batch at which a network fails."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch, Batches, BatchStore, Rerun
from bgd_plugin.calibration.findings import Findings
from bgd_plugin.errors import CalibrationError
from bgd_plugin.graph import copy_module
from bgd_plugin.pq.blocks import Geometry
from tests.networks import randomized, vectors


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.norm(self.a(x))))
        return x + y.mul_(0.5)


class _Net(nn.Module):
    """Two blocks, the second one only for some batches, and a layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.twice = _Block(), _Block(), nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        x = self.two(x) if x.shape[0] > 2 else x
        return self.twice(torch.tanh(self.twice(x)))


def _rerun(*, same: bool = False, sizes: tuple[int, ...] = (4, 2, 4)) -> tuple[Rerun, Any, Any, list[Tensor]]:
    torch.manual_seed(0)
    reference = randomized(_Net())
    student = reference if same else copy_module(reference, share_tensors=True)
    if not same:
        student.one.a = nn.Linear(12, 12)  # as if it were quantized
    data = [x[:size] for x, size in zip(vectors(len(sizes)), sizes, strict=True)]
    weights = {path: m.weight for path, m in reference.named_modules() if isinstance(m, nn.Linear)}
    norms = ["one.norm", "two.norm"]
    rerun = Rerun(student, reference, Batches.of([Batch((x,)) for x in data]), weights, norms)
    return rerun, student, reference, data


@torch.no_grad()
def _given(network: Any, path: str, data: list[Tensor]) -> list[Tensor]:
    seen: list[Tensor] = []
    hook = network.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    for x in data:
        network(x)
    hook.remove()
    return seen


def test_layers_and_norms_are_counted_over_all_batches() -> None:
    rerun, *_ = _rerun()
    assert rerun.order == ["one.a", "one.norm", "one.b", "two.a", "two.norm", "two.b", "twice"]
    assert [rerun.times(name) for name in rerun.order] == [3, 3, 3, 2, 2, 2, 6]
    assert [name for name in rerun.order if rerun.runs_twice(name)] == ["twice"]
    assert rerun.seconds > 0 and not rerun.is_whole and not rerun.strayed
    assert [len(rerun.inputs(name)) for name in ("one.b", "two.b", "twice")] == [3, 2, 6]


@torch.no_grad()
def test_a_block_has_the_students_arguments_and_the_float_networks_answers() -> None:
    rerun, student, reference, data = _rerun()
    assert rerun.blocks(["one.a", "one.b", "two.a"], 2) == ["one", "two"]
    runs = rerun.block_runs("one")
    for ((arguments, named), answer), x in zip(runs, data, strict=True):
        assert torch.equal(arguments[0], x) and not named
        torch.testing.assert_close(answer, reference.one(x))
    runs = rerun.block_runs("two")
    assert len(runs) == 2  # one batch does not come there
    for ((arguments, _), answer), x in zip(runs, [data[0], data[2]], strict=True):
        torch.testing.assert_close(arguments[0], student.one(x))
        torch.testing.assert_close(answer, reference.two(reference.one(x)))
    assert not rerun.is_whole


@torch.no_grad()
def test_a_network_beside_itself_runs_once() -> None:
    rerun, student, reference, _ = _rerun(same=True)
    ran: list[int] = []
    student.one.a.register_forward_pre_hook(lambda *_: ran.append(1))
    pairs = list(rerun.inputs("one.b").pairs())
    assert len(ran) == 3 and all(torch.equal(mine, theirs) for mine, theirs, _ in pairs)
    ((arguments, _), answer), *_ = rerun.block_runs("two")
    torch.testing.assert_close(answer, reference.two(arguments[0]))


def test_inputs_of_norms_come_from_both_networks_batch_by_batch() -> None:
    rerun, student, reference, data = _rerun()
    mine, theirs = rerun.norm_inputs("one.norm")
    for found, network in ((mine, student), (theirs, reference)):
        assert len(found) == 3
        for one, other in zip(found, _given(network, "one.norm", data), strict=True):
            torch.testing.assert_close(one, other)
    assert rerun.together("one.norm") == ["one.norm"] and rerun.place == "one.norm"


@pytest.mark.parametrize(("shape", "strays"), [((2, 3), False), ((1, 3), False), ((2, 3), True)])
def test_where_networks_part_the_students_inputs_stand_for_both(shape: Any, strays: bool) -> None:
    store, geometry = BatchStore(), Geometry.linear()
    store.append({})
    own, other, skip, product = torch.ones(2, 3), torch.zeros(shape), torch.ones(2, 4), torch.zeros(2, 4)
    runs: Any = {
        "student": _run([(own, geometry)], strayed=strays, skips={"a": skip}),
        "reference": _run([(other, geometry)], strayed=False, skips={"a": skip}, products={"a": product}),
    }
    findings = Findings(store, "walk ", ["student", "reference"])
    assert findings.put(store.open(0), runs, ["a"]) is strays
    parted = strays or shape != (2, 3)
    assert findings.calls("student", "a")[0][0][0] is own
    assert findings.calls("reference", "a")[0][0][0] is (own if parted else other)
    assert (findings.products("a") is None) is parted
    skips = findings.skips("a")
    assert skips is not None and skips[0][0] is skips[1][0] is skip


def test_what_is_not_in_all_batches_is_not_found() -> None:
    store, x = BatchStore(), torch.ones(2, 3)
    findings = Findings(store, "walk ", ["student", "reference"])
    for batch, (skips, products) in enumerate([({"a": x}, {"a": x, "b": x}), ({}, {"b": x})]):
        store.append({})
        run = _run([(x, Geometry.linear())], skips=skips, products=products)
        run.calls["b"] = run.calls["a"]
        findings.put(store.open(batch), {"student": run, "reference": run}, ["a", "b"])
    assert findings.skips("a") is None and findings.products("a") is None and findings.skips("c") is None
    found = findings.products("b")
    assert found is not None and found(1) is x
    findings.clear(["b"])
    assert findings.products("b") is None


def _run(calls: list[Any], *, strayed: bool = False, skips: Any = None, products: Any = None) -> Any:
    return SimpleNamespace(calls={"a": calls}, strayed=strayed, skips=skips or {}, products=products or {})


def test_a_network_that_fails_names_the_callers_batch() -> None:
    """The batch may lie there in pieces."""
    network = nn.Sequential(nn.Linear(12, 4))
    batches = Batches.of([])
    batches.append([Batch((x,)) for x in vectors(2)])
    batches.append([Batch((torch.ones(3, 7),))])
    with pytest.raises(CalibrationError, match="the network fails on calibration batch 1: "):
        Rerun(network, network, batches, {"0": network[0].weight}, [])


@torch.no_grad()
def test_an_answer_begins_at_what_is_kept_and_writes_nothing_into_it() -> None:
    rerun, student, _, data = _rerun()
    for name in ("one.a", "two.a"):
        rerun.inputs(name)
    for _ in range(2):
        for batch, x in enumerate(data):
            torch.testing.assert_close(rerun.finish(batch), student(x))
