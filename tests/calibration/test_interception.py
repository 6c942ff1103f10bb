"""Modules' calls that somebody else answers, for a while."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin.calibration.interception import intercepted, run_module


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))


def test_calls_are_answered_with_their_path_and_module() -> None:
    network, seen = _network(), []

    def answered(path: str, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append((path, module))
        return args[0] + 1

    with intercepted(network, ["0", "2", "not there"], answered):
        assert torch.equal(network(torch.ones(1, 3)), torch.full((1, 3), 3.0))
    assert seen == [("0", network[0]), ("2", network[2])]


def test_run_module_runs_forward_and_hooks_of_the_module_itself() -> None:
    network, x = _network(), torch.ones(1, 3)
    network[0].register_forward_hook(lambda module, args, output: output * 2)
    wanted = network(x)
    with intercepted(network, ["0"], lambda _, module, *args, **kwargs: run_module(module, args, kwargs)):
        assert torch.equal(network(x), wanted)


@pytest.mark.parametrize("fails", [True, False])
def test_afterwards_modules_are_called_as_before(fails: bool) -> None:
    network, x = _network(), torch.ones(1, 3)
    wanted, before = network(x), [dict(vars(module)) for module in network.modules()]
    try:
        with intercepted(network, ["0", "2"], lambda *_: x):
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert torch.equal(network(x), wanted)
    assert [dict(vars(module)) for module in network.modules()] == before


def test_within_another_interception_that_one_is_back_afterwards() -> None:
    network, x = _network(), torch.ones(1, 3)
    with intercepted(network, ["0"], lambda *_: torch.zeros(1, 3)):
        outer = network(x)
        with intercepted(network, ["0"], lambda *_: torch.ones(1, 3)):
            assert not torch.equal(network(x), outer)
        assert torch.equal(network(x), outer)


def test_a_module_at_two_paths_is_itself_afterwards() -> None:
    layer = nn.Linear(3, 3)
    network, seen = nn.Sequential(layer, layer), []
    before = dict(vars(layer))
    with intercepted(network, ["0", "1"], lambda path, _, x: seen.append(path) or x):
        network(torch.ones(1, 3))
    assert seen == ["1", "1"]  # a call does not tell by which path
    assert dict(vars(layer)) == before
