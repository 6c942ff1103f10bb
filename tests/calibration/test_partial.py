"""One run of a network up to some layers, beside the record of a whole run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.calibration.partial import PartialRun, Request, _product_of
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


def test_a_block_that_is_a_layer_before_a_skip_gives_its_output() -> None:
    run, network, _ = _run(["inner.out"])
    run.up_to("inner.out")
    assert run.given is not None and torch.equal(run.answer, network.inner.out(run.given[0][0])) and run.answer.any()


def test_companions_are_known_from_the_first_of_them() -> None:
    run, network, _ = _run(["inner.q", "inner.k"])
    ran: list[str] = []
    for name in ("q", "k"):
        network.inner.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    run.go()
    assert not ran and run.calls["inner.q"][0][0] is run.calls["inner.k"][0][0]


def test_a_run_goes_on_to_products_skips_and_the_end_of_a_piece() -> None:
    network, _, recording = _setting()
    groups = [["inner.q", "inner.k"], ["inner.out"]]
    weights = {name: network.get_submodule(name).weight for group in groups for name in group}
    outputs: dict[str, Any] = {}
    request = Request(groups=groups, weights=weights, gives_products=True, through="inner")
    run = PartialRun(network, Batch((X,)), recording, request, outputs, (), {}).go()
    assert {name: len(calls) for name, calls in run.calls.items()} == {"inner.q": 1, "inner.k": 1, "inner.out": 1}
    x = run.calls["inner.out"][0][0]
    torch.testing.assert_close(run.products, {"inner.out": x @ weights["inner.out"].mT})
    assert torch.equal(run.skips["inner.out"], X) and run.shapes == {"inner.out": x.shape}
    with torch.no_grad():
        assert torch.equal(outputs["inner"], network.inner(X)) and run.stored == {"inner"} and network.calls == 0
    without = PartialRun(network, Batch((X,)), recording, _request(network, ["inner.out"]), {}, (), {}).go()
    assert not without.products and without.skips


aten: Any = torch.ops.aten
W, B = torch.randn(3, 4), torch.randn(3)


@pytest.mark.parametrize(
    ("operator", "args", "kwargs", "is_product"),
    [
        (aten.mm.default, (X, W.mT), {}, True),
        (aten.addmm.default, (B, X, W.mT), {}, True),
        (aten.addmm.default, (B, X, W.mT), {"beta": 2}, False),
        (aten.addmm.default, (torch.ones(2, 3), X, W.mT), {}, False),
        (aten.mm.default, (X, 2 * W.mT), {}, False),
        (aten.mm.default, (X, W.mT[:, :2]), {}, False),
        (aten.mm.default, (X, W.view(4, 3)), {}, False),
        (aten.mul.Tensor, (X, X), {}, False),
    ],
)
def test_only_a_layers_own_product_counts(operator: Any, args: Any, kwargs: Any, is_product: bool) -> None:
    found = _product_of(W, operator, args, kwargs, operator(*args, **kwargs))
    assert (found is not None) is is_product
    if found is not None:
        torch.testing.assert_close(found, X @ W.mT)
    assert _product_of(W.unsqueeze(0), operator, args, kwargs, operator(*args, **kwargs)) is None
