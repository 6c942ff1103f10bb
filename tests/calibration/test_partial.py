"""One run of a network up to some layers, beside the record of a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.calibration.partial import PartialRun, Request
from bgd_plugin.calibration.recording import Recording, recorded

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class _Inner(nn.Module):
    """q and k share an input, and are followed by a write to it; out ends a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x)
        q, k = self.q(y), self.k(y)
        y.mul_(0)
        result: Tensor = x + self.out(q * k + y)
        return result


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.twice, self.norm, self.last = _Inner(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        x = self.twice(torch.where(x > 0, x, -x))
        first = x
        x = self.norm(self.twice(x.clone()))
        first.zero_()
        self.calls += 1
        result: Tensor = self.last(x)
        return result


NAMES = ("inner.q", "inner.k", "inner.out", "twice", "last")


def _setting() -> tuple[_Net, dict[str, Tensor], Recording]:
    torch.manual_seed(0)
    network = _Net().eval()
    weights = {name: network.get_submodule(name).weight.detach() for name in NAMES}
    found = recorded(network, Batch((X,)), weights, ["norm"])  # type: ignore[arg-type]
    network.calls = 0
    return network, weights, found  # type: ignore[return-value]


def _request(network: Any, names: list[str], **options: Any) -> Request:
    weights = {name: network.get_submodule(name).weight for name in names if name in NAMES}
    return Request(groups=[names], weights=weights, **options)


def _run(names: list[str], outputs: Any = None, finished: Any = ()) -> tuple[PartialRun, _Net, dict[str, Any]]:
    network, _, recording = _setting()
    kept = {} if outputs is None else outputs
    return PartialRun(network, Batch((X,)), recording, _request(network, names), kept, finished, {}), network, kept


def _literal(path: str) -> list[Tensor]:
    """Inputs of a module in a whole run."""
    network, *_ = _setting()
    seen: list[Tensor] = []
    network.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    with torch.no_grad():
        network(X)
    return seen


@pytest.mark.parametrize("names", [["inner.q", "inner.k"], ["inner.out"], ["twice"], ["norm"], ["last"]])
def test_it_finds_the_inputs_of_a_whole_run_and_stops(names: list[str]) -> None:
    """Whatever is written to them afterwards."""
    run, network, _ = _run(names)
    run.go()
    for name in names:
        expected = _literal(name)
        assert len(run.calls[name]) == len(expected)
        assert all(torch.equal(x, other) for (x, _), other in zip(run.calls[name], expected, strict=True))
    assert network.calls == (1 if names == ["last"] and not run.skips and network.calls else 0)
    assert not run.strayed


def test_layers_with_one_input_share_a_copy_and_others_do_not() -> None:
    run, *_ = _run(["inner.q", "inner.k"])
    run.go()
    assert run.calls["inner.q"][0][0] is run.calls["inner.k"][0][0]
    run, *_ = _run(["twice"])
    run.go()
    assert run.calls["twice"][0][0] is not run.calls["twice"][1][0]


def test_the_skip_is_found_behind_a_single_layer_that_ends_a_branch() -> None:
    run, *_ = _run(["inner.out"])
    run.go()
    assert run.skips.keys() == {"inner.out"} and torch.equal(run.skips["inner.out"], X)
    for names in (["inner.q"], ["twice"], ["inner.q", "inner.k"]):
        run, *_ = _run(names)
        assert not run.go().skips


def test_a_layer_that_runs_twice_ends_no_branch() -> None:
    network, _weights, recording = _setting()
    recording.branches.add("twice")
    run = PartialRun(network, Batch((X,)), recording, _request(network, ["twice"]), {}, (), {}).go()
    assert not run.skips and len(run.calls["twice"]) == 2


def test_what_does_not_run_on_this_batch_runs_nothing() -> None:
    network, _, recording = _setting()
    ran: list[int] = []
    network.register_forward_pre_hook(lambda *_: ran.append(1))
    recording.counts.clear()
    run = PartialRun(network, Batch((X,)), recording, _request(network, ["last"]), {}, (), {}).go()
    assert not ran and run.calls == {"last": []}


def test_finished_pieces_are_kept_and_stand_for_their_runs() -> None:
    run, _, outputs = _run(["last"], finished={"inner"})
    run.go()
    assert run.stored == {"inner"} and list(outputs) == ["inner"]
    again, network, _ = _run(["last"], outputs)
    network.inner.forward = None  # type: ignore[assignment, method-assign]
    again.go()
    assert torch.equal(again.calls["last"][0][0], run.calls["last"][0][0])
    assert not again.stored and not again.strayed
    outputs["inner"] = outputs["inner"] + 1
    other, *_ = _run(["twice"], outputs)
    assert not torch.equal(other.go().calls["twice"][0][0], _literal("twice")[0])


def test_up_to_a_piece_it_gives_arguments_and_answer() -> None:
    run, network, _ = _run(["inner.q"])
    run.up_to("inner")
    assert run.given is not None and torch.equal(run.given[0][0], X)
    assert torch.equal(run.answer, _literal("twice")[0].abs()) or run.answer.shape == X.shape
    network, *_ = _setting()
    with torch.no_grad():
        assert torch.equal(run.answer, network.inner(X))
    ((q, _),) = run.calls["inner.q"]  # it did not end there
    assert torch.equal(q, _literal("inner.q")[0])  # as it was before code wrote to it
    assert network.calls == 0


def test_a_run_that_executes_other_operators_has_strayed() -> None:
    network, _weights, recording = _setting()
    recording.decisions.clear()
    run = PartialRun(network, Batch((X,)), recording, _request(network, ["last"]), {}, (), {}).go()
    assert run.strayed
