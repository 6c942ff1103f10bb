"""What one run of the float network leaves behind."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bgd_plugin.calibration import Batch
from bgd_plugin.calibration.recording import ANSWER, Recording, fingerprint, recorded, same_print
from bgd_plugin.calibration.returned import input_identity


class _Inner(nn.Module):
    """Two layers with one input, and a layer whose output a skip connection is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.out(self.q(x) * self.k(x))
        return y


class _Writes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


class _Strange(nn.Module):
    def forward(self, x: Tensor) -> object:
        return (x, object())


class _Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.table = _Inner(), nn.BatchNorm1d(4), nn.Embedding(3, 4)
        self.writes, self.strange, self.aside = _Writes(), _Strange(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table(torch.tensor([0, 2]))
        x = self.norm(self.inner(self.inner(x)))
        self.aside(x)
        x = self.strange(self.writes(x))[0]
        return torch.where(x > 0, x, 0.0)


NAMES = ("inner.q", "inner.k", "inner.out", "table", "aside")


def _recorded() -> Recording:
    torch.manual_seed(0)
    network = _Outer().eval()
    weights = {name: network.get_submodule(name).weight for name in NAMES}
    return recorded(network, Batch((torch.randn(2, 4),)), weights, ["norm"])


def test_layers_and_norms_are_counted_in_their_order() -> None:
    found, twice = _recorded(), ["inner.q", "inner.k", "inner.out"] * 2
    assert found.order == ["table", *twice, "norm", "aside"]
    assert found.counts == {"inner.q": 2, "inner.k": 2, "inner.out": 2, "norm": 1, "aside": 1}  # no table look-ups
    assert found.calls["inner"] == found.calls["inner.q"] == 2
    assert {name: len(prints) for name, prints in found.prints.items()} == {
        "inner.q": 2,
        "inner.k": 2,
        "inner.out": 2,
        "aside": 1,
    }


def test_what_runs_inside_of_what() -> None:
    found = _recorded()
    assert found.contents["inner"] == {"inner.q", "inner.k", "inner.out"}
    assert found.contents["norm"] == {"norm"} and found.contents["table"] == {"table"}
    assert found.parents["inner.q"] == "inner" and found.parents["inner"] == ""


def test_who_shares_an_input_and_who_ends_a_branch() -> None:
    found = _recorded()
    assert found.shares == {"inner.k": "inner.q"}
    assert found.branches == {"inner.out"}
    assert found.prints["inner.k"] == found.prints["inner.q"] != found.prints["inner.out"]


def test_who_reads_what() -> None:
    readers = _recorded().readers
    assert {"norm", "inner"} <= readers["inner"]
    assert {"inner.q", "inner.k"} <= readers["table"]
    assert "aside" in readers["norm"] and ANSWER in readers["norm"] | readers["strange"]
    assert ANSWER not in readers.get("aside", ())


def test_modules_that_write_or_return_other_things_are_unfit() -> None:
    assert _recorded().unfit == {"writes", "strange"}


def test_decisions_are_numbered_along_the_modules() -> None:
    found = _recorded()
    assert [len(found.decisions), found.spans["inner"], found.spans["strange"]] == [1, (0, 0), (0, 0)]


def test_an_unchanged_tensor_is_known_again_and_a_changed_one_is_not() -> None:
    x = torch.randn(2, 3)
    identity = input_identity(x)
    assert identity == input_identity(x[:])
    for other in (x.clone(), x.T, x[:1], x.view(torch.int32)):
        assert input_identity(other) != identity
    x += 1
    assert input_identity(x) != identity
    with torch.inference_mode():
        assert input_identity(torch.ones(2)) is None


def test_fingerprints_tell_other_inputs_apart() -> None:
    x = torch.randn(50, 4)
    one = [fingerprint(x)]
    assert one[0][0] == (50, 4)
    assert math.isclose(one[0][1], float(x.mean()), abs_tol=1e-6)
    assert math.isclose(one[0][2], float(x.square().mean().sqrt()), rel_tol=1e-5)
    assert same_print(one, [fingerprint(x + 1e-5)])
    for other in (x + 0.01, x * 1.01, x.view(4, 50)):
        assert not same_print(one, [fingerprint(other)])
    assert not same_print(one, one * 2)


def test_fingerprints_of_centred_inputs_are_compared_on_their_scale() -> None:
    """A mean near zero has few digits that count."""
    one, other = ((3,), 1e-9, 1.0), ((3,), -1e-6, 1.0)
    assert same_print([one], [other])
    assert not same_print([one], [((3,), 0.01, 1.0)])
    assert same_print([((3,), math.nan, math.nan)], [((3,), math.nan, math.nan)])
    assert not same_print([((3,), math.nan, math.nan)], [one])


def test_an_empty_input_has_a_fingerprint() -> None:
    assert fingerprint(torch.ones(0, 4)) == ((0, 4), 0.0, 0.0)


def test_a_layer_that_runs_twice_on_one_input_does_not_share_it_with_itself() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.a(x) + self.a(x)
            return y

    network = Twice().eval()
    found = recorded(network, Batch((torch.randn(2, 4),)), {"a": network.a.weight}, [])
    assert not found.shares and found.counts == {"a": 2} and len(found.prints["a"]) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:FutureWarning")
def test_scripted_parts_run_and_are_not_watched() -> None:
    class Scripted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), torch.jit.trace(nn.Tanh(), torch.ones(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x))
            return y

    network = Scripted().eval()
    found = recorded(network, Batch((torch.randn(2, 4),)), {"a": network.a.weight}, [])
    assert found.order == ["a"] and "b" not in found.calls
