"""Public names say what they do, what each argument is, and what they return: the reference is made from this."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MODULES = ("bgd_plugin", "bgd_plugin.results", "bgd_plugin.errors", "bgd_plugin.fx", "bgd_plugin.integration")


def _public() -> Iterator[tuple[str, Any]]:
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")]):
            value = getattr(module, attribute)
            if inspect.isfunction(value) or (inspect.isclass(value) and value.__module__.startswith("bgd_plugin")):
                yield f"{name}.{attribute}", value


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Public functions, and the public methods that a class of ours defines itself, other than torch's."""
    for name, value in _public():
        if inspect.isfunction(value):
            yield name, value
            continue
        foreign = {key for base in value.__mro__ if not base.__module__.startswith("bgd_plugin") for key in vars(base)}
        for key, method in vars(value).items():
            function = getattr(method, "__func__", method)
            if inspect.isfunction(function) and not key.startswith("_") and key not in foreign:
                yield f"{name}.{key}", function


@pytest.mark.parametrize(("name", "value"), [pytest.param(*found, id=found[0]) for found in _public()])
def test_public_names_have_a_docstring(name: str, value: Any) -> None:
    assert (value.__doc__ or "").strip(), name


@pytest.mark.parametrize(("name", "function"), [pytest.param(*found, id=found[0]) for found in _functions()])
def test_arguments_and_results_are_described(name: str, function: Callable[..., Any]) -> None:
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    described = re.findall(r"^    ([\w*, ]+):", text, flags=re.MULTILINE)
    known = {argument.strip(" *") for line in described for argument in line.split(",")}
    wanted = {argument for argument in signature.parameters if argument not in ("self", "cls")}
    assert not wanted - known, f"{name} does not say what these are: {', '.join(sorted(wanted - known))}"
    returns = signature.return_annotation
    if wanted and returns not in (None, "None", inspect.Signature.empty):
        assert "Returns:" in text, f"{name} does not say what it returns"
