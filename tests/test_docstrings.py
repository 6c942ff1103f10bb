"""Docstrings describe arguments, the shapes of tensors, the units of numbers, and what is raised."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bgd_plugin import errors

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "bgd_plugin").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])
MODULES = ("bgd_plugin", "bgd_plugin.results", "bgd_plugin.errors", "bgd_plugin.fx", "bgd_plugin.integration")
TREES = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in SOURCES}

# Containers of our own types need no more words than one of them.
CONTAINERS = {"None", "Sequence", "Iterable", "Iterator", "Collection", "list", "tuple", "frozenset", "set"}
NUMBERS = {"int", "float", "None"}
# A parameter of one of these types, or of a class of ours, is described by its type.
DESCRIBED = {node.name for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {
    *("Module", "GraphModule", "Node", "Graph", "Parameter", "Generator", "device", "dtype", "Path", "Logger"),
    *("PreTrainedModel", "ModuleType"),
}
# Arguments of the command line, which have their `help`.
OPTIONS = {
    target.id
    for node in TREES["bgd_plugin/cli/arguments.py"].body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name)
} | {"Annotated"}

SHAPE = re.compile(r"\[[^\]]*\]|\bshape[sd]?\b|\bscalar\b", re.IGNORECASE)
_UNITS = (
    *("bytes?", "bits?", "MiB", "nats?", "seconds?", "shares?", "ratio", "factors?", "fraction", "pixels?", "numbers?"),
    *("steps?", "epochs?", "count", "size", "index", "position", "place", "seed", "how (many|often|long|far)", "times"),
    *(
        "squared",
        "relative",
        "variance",
        "deviation",
        "divergence",
        "error",
        "loss",
        "rate",
        "at (most|least)",
        "batch",
    ),
    *(
        "tolerance",
        "rank",
        "power",
        "rows",
        "columns",
        "lanes",
        "channels",
        "batches",
        "layers",
        "samples",
        "processes",
    ),
    *("threads", "dimensions?", "groups", "norm", "exponent", "damping", "weight", "positions"),
)
UNIT = re.compile(rf"\b({'|'.join(_UNITS)})\b", re.IGNORECASE)
CHECK = re.compile(r"_?(check|checked|require)(_\w+)?")


@dataclass(frozen=True, kw_only=True)
class Documented:
    """A public function or method, with its docstring and that of its module."""

    place: str
    node: ast.FunctionDef
    text: str
    module: str = ""

    def entry(self, name: str) -> str:
        """What is said of a parameter: its entry under `Args:`, else the sentences of the prose that name it."""
        found = re.search(rf"^ +[\w*, ]*\b{name}\b[\w*, ]*: (.*(?:\n {{8}} *.*)*)", self.text, flags=re.MULTILINE)
        if found:
            return found.group(1)
        sentences = re.split(r"(?<=[.:;])\s", f"{self.text.partition('Args:')[0]} {self.module}")
        said = re.compile(rf"\b({name}|{name.replace('_', ' ')})\b", re.IGNORECASE)
        return " ".join(sentence for sentence in sentences if said.search(sentence))

    @property
    def returned(self) -> str:
        """What is said of the result."""
        before, _, after = self.text.partition("Returns:")
        return after or before

    def parameters(self) -> Iterator[tuple[str, set[str]]]:
        """Names of the parameters, and the names in their types."""
        arguments = self.node.args
        named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
        for argument in named:
            if argument is not None and argument.arg not in ("self", "cls"):
                yield argument.arg, _types(argument.annotation)

    def raised(self) -> set[str]:
        """Errors of ours that the function raises itself; any error, where it calls a check."""
        names: set[str] = set()
        checks = False
        for node in ast.walk(self.node):
            if isinstance(node, ast.Raise) and node.exc is not None:
                names |= _types(node.exc.func if isinstance(node.exc, ast.Call) else node.exc) & set(errors.__all__)
            elif isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
                called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                checks = checks or bool(CHECK.fullmatch(called))
        return names or ({r"\w*Error"} if checks else set())


def _types(annotation: ast.expr | None) -> set[str]:
    """The names in an annotation, without the modules before them."""
    if annotation is None:
        return set()
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    attributes = [node for node in ast.walk(annotation) if isinstance(node, ast.Attribute)]
    modules = {node.value.id for node in attributes if isinstance(node.value, ast.Name)}
    return names - modules | {node.attr for node in attributes}


def _documented(owner: ast.Module | ast.ClassDef, place: str, about: str) -> Iterator[Documented]:
    for node in owner.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from _documented(node, f"{place}.{node.name}", about)
        elif isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            yield Documented(place=f"{place}.{node.name}", node=node, text=text, module=about)


def _holds_tensors(types: set[str]) -> bool:
    return "Tensor" in types and not types & {"Mapping", "dict", "Callable"}


def _missing(found: Documented) -> Iterator[str]:
    """What a docstring does not say."""
    if not found.text:
        yield "there is no docstring"
        return
    yield from _missing_of_parameters(found)
    returned = _types(found.node.returns)
    if _holds_tensors(returned) and not SHAPE.search(found.returned):
        yield "which shape has the result?"
    measured = UNIT.search(f"{found.returned} {found.node.name.replace('_', ' ')}")
    if returned <= NUMBERS and returned & {"int", "float"} and not measured:
        yield "what does the result count or measure?"
    if any(types & OPTIONS for _, types in found.parameters()):  # the docstring of a command is its help
        return
    for name in sorted(found.raised()):
        if not re.search(rf"Raises:[\s\S]*\b{name}\b", found.text):
            yield f"when does it raise {name}?"


def _missing_of_parameters(found: Documented) -> Iterator[str]:
    for name, types in found.parameters():
        entry = found.entry(name)
        if types & OPTIONS:
            continue
        if not entry and not (types & DESCRIBED and types - CONTAINERS <= DESCRIBED):
            yield f"what is {name}?"
        elif _holds_tensors(types) and not SHAPE.search(entry):
            yield f"which shape has {name}?"
        elif types <= NUMBERS and types & {"int", "float"} and not UNIT.search(f"{entry} {name.replace('_', ' ')}"):
            yield f"what does {name} count or measure?"


@pytest.mark.parametrize("file", TREES)
def test_public_functions_say_what_a_reader_needs(file: str) -> None:
    found = _documented(TREES[file], file, ast.get_docstring(TREES[file]) or "")
    assert [f"{one.place}: {question}" for one in found for question in _missing(one)] == []


@pytest.mark.parametrize("file", TREES)
def test_public_classes_describe_their_fields(file: str) -> None:
    """Fields of frozen dataclasses and the like, by name in the docstring, or each in a string right after it."""
    silent = []
    for node in TREES[file].body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            text = ast.get_docstring(node) or ""
            pairs = zip(node.body, [*node.body[1:], None], strict=True)
            described = [one for one, after in pairs if _is_text(after) or _has_help(one)]
            fields = [one.target.id for one in node.body if _is_field(one) and one not in described]  # type: ignore[union-attr]
            silent += [f"{file}.{node.name}"] * (not text)
            silent += [f"{file}.{node.name}.{name}" for name in fields if not _is_named(name, text)]
    assert silent == []


def _is_field(node: ast.stmt) -> bool:
    named = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not node.target.id.startswith("_")
    return named and "ClassVar" not in _types(node.annotation)  # type: ignore[union-attr]


def _has_help(node: ast.stmt) -> bool:
    """Whether it is an option of the command line, whose `help` says what it is."""
    return isinstance(node, ast.AnnAssign) and any(
        isinstance(part, ast.keyword) and part.arg == "help" for part in ast.walk(node.annotation)
    )


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_named(name: str, text: str) -> bool:
    words = rf"\b({name}|{name.replace('_', ' ')})\b"
    return bool(re.search(words, text, flags=re.IGNORECASE))


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


@pytest.mark.parametrize(("name", "function"), [pytest.param(*found, id=found[0]) for found in _functions()])
def test_public_names_list_each_argument_and_the_result(name: str, function: Callable[..., Any]) -> None:
    """The reference pages are made from these docstrings."""
    text, signature = inspect.getdoc(function) or "", inspect.signature(function)
    described = re.findall(r"^    ([\w*, ]+):", text, flags=re.MULTILINE)
    known = {argument.strip(" *") for line in described for argument in line.split(",")}
    wanted = {argument for argument in signature.parameters if argument not in ("self", "cls")}
    assert not wanted - known, f"{name} does not say what these are: {', '.join(sorted(wanted - known))}"
    returns = signature.return_annotation
    if wanted and returns not in (None, "None", inspect.Signature.empty):
        assert "Returns:" in text, f"{name} does not say what it returns"


@pytest.mark.parametrize(
    ("source", "question"),
    [
        ("def f(x: Tensor) -> None:\n    'x is doubled.'", "which shape has x?"),
        ("def f(x) -> Tensor:\n    'x doubled.'", "which shape has the result?"),
        ("def f(limit: float) -> None:\n    'Stop at the limit.'", "what does limit count or measure?"),
        ("def f(x) -> float:\n    'The quality of x.'", "what does the result count or measure?"),
        ("def f(x, y) -> None:\n    'Add x.'", "what is y?"),
        ("def f() -> None:\n    'Run.'\n    raise ConfigError('no')", "when does it raise ConfigError?"),
        ("def f() -> None:\n    'Run.'\n    check_sizes()", r"when does it raise \w*Error?"),
        ("def f() -> None:\n    pass", "there is no docstring"),
    ],
)
def test_what_is_missing_is_found(source: str, question: str) -> None:
    (found,) = _documented(ast.parse(source), "here", "")
    assert list(_missing(found)) == [question]
