"""Which tests run which lines, and how long each takes: measured once, kept in the build folder."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import coverage
import pytest

__all__ = ["Tests", "measured"]

_SHARED = re.compile(r"\b(sum_|sum_of|total|share_|sums)\b")
_TWIN = "test_twin.py"


@dataclass(frozen=True, kw_only=True)
class Tests:
    """What was measured.

    Attributes:
        lines: names of the tests that run a line, by "path:line".
        seconds: time of each test.
    """

    lines: dict[str, list[str]]
    seconds: dict[str, float]

    def of(self, path: str, line: int, source: str, *, seconds: float) -> list[str]:
        """Tests of a line, those of the folder of the same name first, then the fastest, within a sum of seconds.

        Where values of several processes are summed up, the test that pretends a second process comes first.
        A line that is executed when the module is imported, such as a constant's, has the tests of all lines that
        mention what it defines; where there are none, those of the whole module.
        """
        found = set(self.lines.get(f"{path}:{line}", ()))
        if not found:
            for other in _mentioning(source, line):
                found.update(self.lines.get(f"{path}:{other}", ()))
        if not found:
            found = {t for place, tests in self.lines.items() if place.startswith(f"{path}:") for t in tests}
        folder = f"tests/{Path(path).parent.name}/"
        is_shared = _SHARED.search(source.splitlines()[line - 1]) is not None
        chosen, spent = [], 0.0
        for test in sorted(
            found, key=lambda t: (not (is_shared and _TWIN in t), not t.startswith(folder), self.seconds[t])
        ):
            spent += self.seconds[test]
            if spent > seconds and chosen:
                break
            chosen.append(test)
        return chosen


def _mentioning(source: str, line: int) -> Iterator[int]:
    """Lines that mention a name assigned or defined by the statement at a line."""
    tree = ast.parse(source)
    names = set[str]()
    for node in tree.body:
        if node.lineno <= line <= (node.end_lineno or node.lineno):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            names |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            names |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in names and node.lineno != line:
            yield node.lineno


def _in_functions(source: str) -> Iterator[int]:
    """Lines of functions' bodies; others run when the module is imported, whichever test comes to it first."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from range(node.body[0].lineno, (node.end_lineno or node.lineno) + 1)


class _Contexts:
    """A plugin of pytest: each test is a context of the coverage, and its time is taken."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self._cover = cover
        self.seconds: dict[str, float] = defaultdict(float)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        name, start = item.nodeid.split("[")[0], time.monotonic()
        self._cover.switch_context(name)
        result = yield
        self.seconds[name] += time.monotonic() - start
        return result


def measured(root: Path, folders: Sequence[str], tests: Sequence[str], kept: Path, *, is_kept: bool) -> Tests:
    """The tests of the given folders of the sources.

    Args:
        root: of the repository.
        folders: of the sources.
        tests: arguments of pytest, files and folders among them.
        kept: the file with what an earlier call has measured, which is taken where nothing has changed since.
        is_kept: take it in any case.
    """
    files = sorted(f for top in ("bgd_plugin", "tests") for f in (root / top).rglob("*.py"))
    state = hashlib.sha256(b"".join(f.read_bytes() for f in files) + repr((folders, tests)).encode()).hexdigest()
    if kept.exists():
        found = json.loads(kept.read_text())
        if found.pop("state") == state or is_kept:
            return Tests(**found)
    cover = coverage.Coverage(
        data_file=None, source=[str(root / "bgd_plugin" / folder) for folder in folders], config_file=False
    )
    contexts = _Contexts(cover)
    start = time.monotonic()
    cover.start()
    status = pytest.main(["-q", "-p", "no:cacheprovider", "--no-header", "-n", "0", *tests], plugins=[contexts])
    cover.stop()
    if status:
        raise SystemExit("the tests fail without any mutant: repair that first")
    data, lines = cover.get_data(), dict[str, list[str]]()
    for file in data.measured_files():
        path, called = Path(file).relative_to(root), set(_in_functions(Path(file).read_text()))
        for line, names in data.contexts_by_lineno(file).items():
            if line in called:
                lines[f"{path}:{line}"] = sorted(set(names) - {""})
    result = Tests(lines={k: v for k, v in lines.items() if v}, seconds=dict(contexts.seconds))
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps({"state": state, "lines": result.lines, "seconds": result.seconds}))
    print(f"tests and lines: {len(result.seconds)} tests in {time.monotonic() - start:.0f} s")
    return result
