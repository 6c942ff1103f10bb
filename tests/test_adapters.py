"""Adapters are found by their entry points and register themselves."""

from __future__ import annotations

import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import pytest

import bgd_plugin as bgd
from bgd_plugin import BGDError


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two adapters: one that counts its registrations, one whose framework is not installed."""
    calls: list[str] = []
    module: Any = ModuleType("adapter_of_the_test")
    module.register = lambda: calls.append("registered")
    monkeypatch.setitem(sys.modules, "adapter_of_the_test", module)
    points = [
        metadata.EntryPoint("working_one", "adapter_of_the_test", "bgd_plugin.adapters"),
        metadata.EntryPoint("broken_one", "a_framework_that_is_not_there", "bgd_plugin.adapters"),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "bgd_plugin.adapters" else [])
    return calls


def test_loading_registers_and_gives_the_module(adapters: list[str]) -> None:
    assert bgd.load_adapter("working_one") is sys.modules["adapter_of_the_test"]
    assert adapters == ["registered"]


def test_an_unknown_adapter_is_told_with_those_there_are(adapters: list[str]) -> None:
    with pytest.raises(BGDError, match="there is no adapter 'other'; installed adapters: broken_one, working_one"):
        bgd.load_adapter("other")


def test_an_unknown_adapter_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    with pytest.raises(BGDError, match="there is no adapter 'other'; installed adapters: none"):
        bgd.load_adapter("other")


def test_a_framework_that_is_missing_says_what_to_install(adapters: list[str]) -> None:
    expected = r"adapter 'broken_one' cannot be imported .*: pip install 'bgd-plugin\[broken-one\]'"
    with pytest.raises(BGDError, match=expected):
        bgd.load_adapter("broken_one")
