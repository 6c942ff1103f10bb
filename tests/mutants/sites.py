"""Where the sources can be mutated, and a sample of the mutants there."""

from __future__ import annotations

import ast
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

from tests.mutants.wires import edits, executed

__all__ = ["Mutant", "sampled"]

# Decorators are `no_grad` or fail at once, variables are replaced at random, and no tensor of real numbers has bits.
_LEFT_OUT = ("RemoveDecorator", "VariableReplacer", "VariableInserter", "_BitAnd", "_BitOr", "_BitXor", "Shift")


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """A module with one defect.

    Attributes:
        path: of the module, from the repository's root.
        line: where the defect stands.
        operator: what was done.
        before, after: the changed lines.
        source: the whole module.
    """

    path: str
    line: int
    operator: str
    before: str
    after: str
    source: str


def sampled(root: Path, folders: Sequence[str], count: int, seed: int, operators: str = "") -> list[Mutant]:
    """About `count` mutants of each folder, each at another place; 0: all there are.

    Args:
        root: of the repository.
        folders: of the sources.
        count: of each folder.
        seed: of the sample.
        operators: the beginning of their names.
    """
    chosen = []
    for folder in folders:
        places: dict[tuple[str, int, int], list[tuple[str, str, int]]] = defaultdict(list)
        for file in sorted((root / "bgd_plugin" / folder).glob("*.py")):
            path = str(file.relative_to(root))
            for line, column, kind, index in _sites(file.read_text()):
                if kind.startswith(operators):
                    places[path, line, column].append((path, kind, index))
        generator = random.Random(f"{seed} {folder}")
        order = sorted(places)
        generator.shuffle(order)
        mutants = (_made(root, *generator.choice(places[place])) for place in order)
        if not count:
            mutants = (_made(root, *one) for place in sorted(places) for one in places[place])
        kept = (mutant for mutant in mutants if mutant is not None)
        chosen += [mutant for mutant, _ in zip(kept, range(count or 10**9), strict=False)]
    return chosen


def _sites(source: str) -> Iterator[tuple[int, int, str, int]]:
    """Line, column, kind of defect, and its number among the module's of that kind."""
    lines = {node.lineno for node in executed(ast.parse(source)) if isinstance(node, ast.expr)}
    tree = get_ast(source)
    nodes = list(ast_nodes(tree))
    for name in operator_names():
        if any(left_out in name for left_out in _LEFT_OUT):
            continue
        operator, index = get_operator(name)(), 0
        for node in nodes:
            for (line, column), _ in operator.mutation_positions(node):
                if line in lines:
                    yield line, column, name, index
                index += 1
    for index, edit in enumerate(edits(source.encode())):
        yield edit.line, edit.start, "wires", index


def _made(root: Path, path: str, kind: str, index: int) -> Mutant | None:
    """A mutant, unless nothing has changed or it is no Python."""
    source = (root / path).read_text()
    if kind == "wires":
        edit = list(edits(source.encode()))[index]
        kind, mutated = edit.operator, edit.applied(source.encode()).decode()
    else:
        try:
            mutated = mutate_code(source, get_operator(kind)(), index) or source
        except AttributeError:  # of some operators, at `except` with a dotted name
            return None
    try:
        same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
    except SyntaxError:
        return None
    if same or _is_typing(source, mutated):
        return None
    line, before, after = _changed(source, mutated)
    return Mutant(path=path, line=line, operator=kind, before=before, after=after, source=mutated)


def _is_typing(source: str, mutated: str) -> bool:
    """Whether they differ in annotations and assertions alone."""
    one, other = (list(map(_shape, executed(ast.parse(text)))) for text in (source, mutated))
    return one == other


def _shape(node: ast.AST) -> tuple[object, ...]:
    value = node.value if isinstance(node, ast.Constant) else None
    return type(node), getattr(node, "id", ""), getattr(node, "attr", ""), getattr(node, "arg", ""), value


def _changed(source: str, mutated: str) -> tuple[int, str, str]:
    """Number of the first line that differs, and the lines that do, before and after."""
    one, other = source.splitlines(), mutated.splitlines()
    start = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    end = 0
    while end < min(len(one), len(other)) - start and one[-1 - end] == other[-1 - end]:
        end += 1
    before, after = (" ".join(map(str.strip, text[start : len(text) - end])) for text in (one, other))
    return start + 1, before, after
