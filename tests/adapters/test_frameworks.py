"""The frameworks are where `make test` says they are, in versions that the adapters know."""

from __future__ import annotations

import importlib.util
import os
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = {
    extra: [Requirement(text) for text in PROJECT["optional-dependencies"][extra]]
    for extra in sorted(Requirement(PROJECT["optional-dependencies"]["frameworks"][0]).extras)
}
ADAPTERS = PROJECT["entry-points"]["bgd_plugin.adapters"]


@pytest.mark.skipif(os.environ.get("BGD_FRAMEWORKS") != "required", reason="the frameworks need not be installed here")
@pytest.mark.parametrize("extra", EXTRAS)
def test_a_framework_is_installed_where_its_tests_may_not_be_skipped(extra: str) -> None:
    for asked in EXTRAS[extra]:
        assert asked.specifier.contains(metadata.version(asked.name), prereleases=True), asked


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_a_module_and_an_extra(name: str) -> None:
    assert name.replace("_", "-") in EXTRAS
    assert ADAPTERS[name] == f"bgd_plugin_adapters.{name}"


def test_every_module_of_the_package_is_declared() -> None:
    package = importlib.util.find_spec("bgd_plugin_adapters")
    assert package and package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0])
    modules = {
        path.stem for path in [*folder.glob("[!_]*.py"), *(init.parent for init in folder.glob("*/__init__.py"))]
    }
    assert modules <= set(ADAPTERS)
