"""What is checked before a run starts, with processes that are played by hand."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn

from bgd_plugin import BGDConfig, FinetuningConfig
from bgd_plugin.errors import CalibrationError, ConfigError
from bgd_plugin.quantization import checks
from bgd_plugin.quantization.checks import check_arguments, require_same_layers

CONFIG = BGDConfig(max_divergence=None)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize("name", ["0.weight", "1.running_mean", "1.running_var"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_learnt_are_finite(name: str, value: float) -> None:
    net = _net()
    dict([*net.named_parameters(), *net.named_buffers()])[name].data.view(-1)[1] = value
    with pytest.raises(ConfigError, match=f"'{name}' of the network contains NaN"):
        check_arguments(net, [], CONFIG, None)


def test_other_buffers_may_be_anything() -> None:
    net = _net()
    net.register_buffer("mask", torch.full((2,), -float("inf")))
    check_arguments(net, [], CONFIG, None)


@pytest.mark.parametrize("place", ["0.weight", "mask"])
def test_values_are_there(place: str) -> None:
    net = _net()
    if place == "mask":
        net.register_buffer("mask", torch.empty(2, device="meta"))
    else:
        net[0] = nn.Linear(4, 4, device="meta")  # type: ignore[index,operator]
    with pytest.raises(ConfigError, match=f"'{place}' is on the meta device"):
        check_arguments(net, [], CONFIG, None)


@pytest.mark.parametrize(("bound", "is_right"), [(None, True), (1, True), (0, False), (-3, False)])
def test_a_bound_on_memory_is_positive(bound: int | None, is_right: bool) -> None:
    if is_right:
        check_arguments(_net(), [], CONFIG, bound)
    else:
        with pytest.raises(ConfigError, match=f"memory_bytes={bound}: give a positive number"):
            check_arguments(_net(), [], CONFIG, bound)


def test_an_iterator_serves_unless_the_data_is_walked_again() -> None:
    check_arguments(_net(), iter([1]), CONFIG, None)
    again = BGDConfig(max_divergence=None, finetuning=FinetuningConfig(steps=1))
    with pytest.raises(CalibrationError, match="finetuning needs it again"):
        check_arguments(_net(), iter([1]), again, None)


def _numbers(monkeypatch: pytest.MonkeyPatch, change: Any = None, config: BGDConfig = CONFIG) -> int:
    """The number by which processes compare what they have."""
    seen: list[int] = []
    monkeypatch.setattr(checks, "processes", lambda: 2)
    monkeypatch.setattr(checks, "largest", lambda number: seen.append(number) or number)
    net = _net()
    if change is not None:
        change(net)
    check_arguments(net, [], config, None)
    assert seen[0] == -seen[1]
    return seen[1]


def test_processes_compare_weights_buffers_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _numbers(monkeypatch)
    assert _numbers(monkeypatch) == plain
    others = [
        _numbers(monkeypatch, lambda net: net[0].weight.data.add_(1)),
        _numbers(monkeypatch, lambda net: net[1].running_mean.add_(1)),
        _numbers(monkeypatch, config=BGDConfig(max_divergence=None, seed=1)),
    ]
    assert len({plain, *others}) == 4


def test_processes_with_other_networks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "processes", lambda: 2)
    for other in (2**50, 0):  # larger or smaller than this process's own number
        monkeypatch.setattr(checks, "largest", lambda number, other=other: max(number, other if number > 0 else -other))
        with pytest.raises(ConfigError, match="have different networks or settings"):
            check_arguments(_net(), [], CONFIG, None)


def test_processes_that_come_to_other_layers_are_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    require_same_layers(["a"])
    monkeypatch.setattr(checks, "processes", lambda: 2)

    def told(*orders: list[str]) -> None:
        monkeypatch.setattr(checks, "from_all", lambda content: [json.dumps(order).encode() for order in orders])
        require_same_layers(orders[0])

    told(["a", "b"], ["a", "b"])
    with pytest.raises(ConfigError, match=r"only some processes run b, c\. Use one"):
        told(["a", "b"], ["a", "c"])
    with pytest.raises(ConfigError, match=r"only some processes run b\. Use one"):
        told(["a"], ["a"], ["a", "b"])
    with pytest.raises(ConfigError, match="the order of layers differs"):
        told(["a", "b"], ["b", "a"])
    many = list(itertools.islice(map(str, itertools.count()), 20))
    with pytest.raises(ConfigError, match=r"run 0, 1, 10, 11, 12, 13, 14, 15\. Use one"):
        told(many, [])
