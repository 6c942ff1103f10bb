"""The fastest way is measured once, kept in a file, and trusted only as far as it makes sense."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from bgd_plugin.kernels import choice
from bgd_plugin.kernels.choice import cache_file, fastest


class Ways:
    """A slow way and a quick one, and how often each was called."""

    def __init__(self) -> None:
        self.calls = {"slow": 0, "quick": 0}

    def slow(self) -> None:
        self.calls["slow"] += 1
        sum(range(300_000))

    def quick(self) -> None:
        self.calls["quick"] += 1

    def fastest(self, key: str) -> str:
        return fastest((key,), lambda: {"slow": self.slow, "quick": self.quick})


def test_it_is_measured_once(caplog: pytest.LogCaptureFixture) -> None:
    ways = Ways()
    with caplog.at_level(logging.INFO):
        assert ways.fastest("a") == "quick"
    measured = dict(ways.calls)
    assert min(measured.values()) >= 3
    assert "slow" in caplog.text and " ms" in caplog.text
    assert ways.fastest("a") == "quick" and ways.calls == measured
    ways.fastest("b")
    assert ways.calls != measured


def test_another_process_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Ways().fastest("a")
    Ways().fastest("b")
    monkeypatch.setattr(choice, "_chosen", {})
    ways = Ways()
    assert ways.fastest("a") == ways.fastest("b") == "quick"
    assert not any(ways.calls.values())


@pytest.mark.parametrize("content", ["", "[]", "{", '{"another machine": {"a": "slow"}}', None])
def test_a_file_that_says_nothing_is_measured_anew(content: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    Ways().fastest("a")
    if content is None:  # a way that this version does not have
        kept = json.loads(cache_file().read_text())
        content = json.dumps({machine: {"('a',)": "magic"} for machine in kept})
    cache_file().write_text(content)
    monkeypatch.setattr(choice, "_chosen", {})
    ways = Ways()
    assert ways.fastest("a") == "quick" and ways.calls["quick"]


def test_a_folder_that_cannot_be_written_to_costs_the_file_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BGD_CACHE", str(tmp_path / "file" / "folder"))
    ways = Ways()
    assert ways.fastest("a") == ways.fastest("a") == "quick"


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_file().name == "kernels.json"
    monkeypatch.delenv("BGD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_file() == Path("/somewhere/bgd_plugin/kernels.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_file() == Path.home() / ".cache/bgd_plugin/kernels.json"
