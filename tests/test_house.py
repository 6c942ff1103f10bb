"""The house: folders that are the steps of the method, short files and functions, a map that is true."""

from __future__ import annotations

import ast
import importlib
import re
import statistics
import tomllib
import types
from collections.abc import Container, Iterable, Iterator
from pathlib import Path

import pytest

import bgd_plugin

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "bgd_plugin"
SOURCES = sorted([*CORE.rglob("*.py"), *(ROOT / "adapters").rglob("*.py")])
PACKAGES = sorted(path.parent for path in CORE.rglob("__init__.py"))
MAP = (ROOT / "docs" / "code-map.md").read_text(encoding="utf-8")


def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def test_six_modules_stand_beside_the_folders() -> None:
    loose = {file.stem for file in CORE.glob("*.py")} - {"__init__"}
    assert len(loose) <= 6, loose
    assert all(f"`{name}`" in MAP for name in loose)


def test_the_map_names_every_folder_in_the_order_of_the_floors() -> None:
    named = re.findall(r"^\| `(\w+)` \|", MAP, flags=re.M)
    assert sorted(named) == sorted(path.name for path in CORE.iterdir() if (path / "__init__.py").is_file())
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (floors,) = [contract["layers"] for contract in contracts if contract["id"] == "floors"]
    heights = {name: height for height, floor in enumerate(floors) for name in floor.split(" | ")}
    assert [heights[name] for name in named] == sorted(heights[name] for name in named)


def test_every_step_of_the_method_is_in_the_file_that_the_map_names() -> None:
    steps = dict(re.findall(r"^\| ([^|`]+) \| `([\w/]+\.py)` \|$", MAP, flags=re.M))
    assert len(steps) >= 18
    assert len(set(steps.values())) == len(steps)
    for step, file in steps.items():
        assert (CORE / file).is_file(), (step, file)


def test_every_module_says_what_it_holds() -> None:
    for file in SOURCES:
        text = ast.get_docstring(_tree(file)) or ""
        assert 10 < len(text.partition("\n")[0]) <= 120, file


def test_files_and_functions_are_short() -> None:
    lengths = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in SOURCES}
    assert {file: length for file, length in lengths.items() if length > 300} == {}
    assert statistics.median(lengths.values()) <= 120
    long = {f"{file}: {name}": length for file in SOURCES for name, length in _bodies(file) if length > 40}
    assert long == {}


def _bodies(file: Path) -> Iterator[tuple[str, int]]:
    """Each function, and the lines of its body without the docstring."""
    for node in ast.walk(_tree(file)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_no_name_hides_a_module(package: Path) -> None:
    name = ".".join(package.relative_to(ROOT).parts)
    module = importlib.import_module(name)
    below = [path.stem for path in package.glob("*.py") if path.stem not in ("__init__", "__main__")]
    below += [path.parent.name for path in package.glob("*/__init__.py")]
    for inner in below:
        importlib.import_module(f"{name}.{inner}")
        assert isinstance(getattr(module, inner), types.ModuleType), f"{name}.{inner} is hidden"


def test_the_public_surface_is_small() -> None:
    assert len(bgd_plugin.__all__) <= 16


def test_a_late_import_hides_no_circle() -> None:
    """Nor does one for type checkers. import-linter sees the direction of imports, wherever they stand."""
    modules = {_name(file): _tree(file) for file in SOURCES}
    early = {name: set(_imported(tree.body, modules)) for name, tree in modules.items()}
    for name, tree in modules.items():
        nested = [node for node in ast.walk(tree) if node not in tree.body]
        for late in set(_imported(nested, modules)) - {"bgd_plugin"}:
            assert name not in _reached(late, early) or name == "bgd_plugin", f"{name} imports {late} late: a circle"


def _name(file: Path) -> str:
    root = ROOT if CORE in file.parents else ROOT / "adapters"
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def _imported(nodes: Iterable[ast.AST], modules: Container[str]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module in modules:
            yield str(node.module)
            yield from (inner for alias in node.names if (inner := f"{node.module}.{alias.name}") in modules)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)


def _reached(start: str, imports: dict[str, set[str]]) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imports[name]
    return seen


def test_mutants_that_compute_the_same_are_of_lines_that_are_there() -> None:
    known = tomllib.loads((ROOT / "tests" / "mutants" / "equivalent.toml").read_text(encoding="utf-8"))["mutant"]
    for one in known:
        lines = map(str.strip, (ROOT / one["path"]).read_text(encoding="utf-8").splitlines())
        assert one["before"] in " ".join(lines), one["before"]
        assert one["reason"] and one["after"] != one["before"]


def test_no_test_file_is_longer_than_four_hundred_lines() -> None:
    long = {
        str(f.relative_to(ROOT)): count
        for f in (ROOT / "tests").rglob("*.py")
        if (count := len(f.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long
