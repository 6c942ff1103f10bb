"""Adapters are found by their entry points, say what they lack, and register themselves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

import bgd_plugin as bgd
from bgd_plugin import BGDError
from bgd_plugin.adapters import adapters as installed
from bgd_plugin.cli.app import app
from bgd_plugin.cli.quiet import quiet


class Distribution(metadata.Distribution):
    """A distribution with the given entry points and requirements."""

    def __init__(self, entry_points: str, requires: str) -> None:
        self.texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: some-package\nVersion: 1\n{requires}",
            "entry_points.txt": f"[bgd_plugin.adapters]\n{entry_points}",
        }

    def read_text(self, filename: str) -> str | None:
        return self.texts.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise NotImplementedError


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Adapters that work, whose framework is missing, of another version, and that fail while they are imported."""
    made: list[str] = []
    module: Any = ModuleType("adapter_of_the_test")
    module.register = lambda: made.append("registered")
    monkeypatch.setitem(sys.modules, "adapter_of_the_test", module)
    distribution = Distribution(
        "working_one = adapter_of_the_test\n"
        "absent_one = a_module_that_is_not_there\n"
        "otherwise_installed_one = adapter_of_the_test\n"
        "newer_one = adapter_of_the_test\n"
        "broken_one = a_module_that_is_not_there\n",
        "Requires-Dist: numpy\n"
        'Requires-Dist: pytest>=8; extra == "working-one"\n'
        'Requires-Dist: a-framework-nobody-has; extra == "absent-one"\n'
        'Requires-Dist: a-framework-nobody-has; extra == "otherwise-installed-one"\n'
        'Requires-Dist: pytest<2,>=1; extra == "newer-one"\n',
    )
    _install(monkeypatch, distribution.entry_points)
    return made


def _install(monkeypatch: pytest.MonkeyPatch, points: Any) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: points if group == "bgd_plugin.adapters" else [])


def test_loading_registers_and_gives_the_module(calls: list[str]) -> None:
    assert bgd.load_adapter("working_one") is sys.modules["adapter_of_the_test"]
    assert calls == ["registered"]


def test_an_unknown_adapter_is_told_with_those_there_are(calls: list[str]) -> None:
    expected = (
        "no adapter 'other': give one of the installed adapters: absent_one, broken_one, newer_one, "
        "otherwise_installed_one, "
    )
    expected += "working_one"
    with pytest.raises(BGDError, match=expected):
        bgd.load_adapter("other")


def test_an_unknown_adapter_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, [])
    with pytest.raises(BGDError, match="no adapter 'other': give one of the installed adapters: none"):
        bgd.load_adapter("other")


def test_a_framework_that_is_missing_says_what_to_install(calls: list[str]) -> None:
    expected = r"'absent_one' .*a-framework-nobody-has is not installed\): pip install 'some-package\[absent-one\]'"
    with pytest.raises(BGDError, match=expected):
        bgd.load_adapter("absent_one")


def test_a_framework_may_come_by_another_distribution(calls: list[str]) -> None:
    assert bgd.load_adapter("otherwise_installed_one") is sys.modules["adapter_of_the_test"]


def test_a_version_that_the_adapter_does_not_know_is_named(calls: list[str]) -> None:
    with pytest.raises(BGDError, match=rf"'newer_one' .*pytest {pytest.__version__} \(the adapter supports <2,>=1\)"):
        bgd.load_adapter("newer_one")
    assert calls == []


def test_an_adapter_that_cannot_be_imported_says_why(calls: list[str]) -> None:
    expected = r"'broken_one' cannot be imported \(ModuleNotFoundError: No module .*: pip install 'some-package\[broken"
    with pytest.raises(BGDError, match=expected):
        bgd.load_adapter("broken_one")


def test_all_are_listed_with_what_they_need(calls: list[str]) -> None:
    found = {adapter.name: adapter for adapter in installed()}
    assert found["working_one"].problem is None
    assert str(found["working_one"].requirements[0]) == f"pytest {pytest.__version__}"
    assert str(found["absent_one"].requirements[0]) == "a-framework-nobody-has is not installed"
    assert "cannot be imported" in str(found["broken_one"].problem)


def test_the_command_line_lists_them(calls: list[str]) -> None:
    done = CliRunner().invoke(app, ["adapters"])
    assert done.exit_code == 0, done.output
    line = next(line for line in done.stdout.splitlines() if line.startswith("working_one"))
    assert f"pytest {pytest.__version__}" in line
    assert "ready" in line
    assert calls == ["registered"]  # of the one whose framework is not known by its distribution
    checked = CliRunner().invoke(app, ["adapters", "--check"]).stdout
    assert "can be imported" in next(line for line in checked.splitlines() if line.startswith("working_one"))
    values = json.loads(CliRunner().invoke(app, ["adapters", "--json"]).stdout)
    assert [value["name"] for value in values] == sorted(value["name"] for value in values)
    assert {value["name"] for value in values if value["problem"] is None} == {"otherwise_installed_one", "working_one"}


def test_the_command_line_says_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, [])
    assert "no adapter found" in CliRunner().invoke(app, ["adapters"]).stdout


def test_the_command_prints_its_table_alone_and_imports_no_framework() -> None:
    frameworks = ("modelopt", "neural_compressor", "torchao", "torch_pruning", "transformers")
    code = f"""
import sys
from bgd_plugin.cli.app import app
from bgd_plugin.cli.quiet import quiet
try:
    app(["adapters"])
except SystemExit:
    pass
assert not [name for name in {frameworks} if name in sys.modules]
"""
    root = Path(__file__).resolve().parents[2]
    paths = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'adapters'}"}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("adapter ")


def test_what_a_framework_prints_is_swallowed_unless_it_fails(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def noisy() -> None:
        os.write(1, b"welcome to the framework\n")
        os.write(2, b"no GPU found\n")

    monkeypatch.setattr(sys.modules["adapter_of_the_test"], "register", noisy)
    with quiet() as written:
        assert not next(adapter for adapter in installed(imported=True) if adapter.name == "working_one").problem
    assert capfd.readouterr() == ("", "")
    assert "welcome to the framework\nno GPU found\n" in written[0]
