"""A group of options is one parameter of a command, and as many options of the command line as it has fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import pytest
import typer

from bgd_plugin.cli.groups import with_groups
from tests.cli.common import RUNNER


@dataclass(frozen=True, kw_only=True)
class _Size:
    """Two numbers."""

    width: Annotated[int, typer.Option(min=1, help="in pixels")] = 3
    height: Annotated[int, typer.Option("--high")] = 4


@dataclass(frozen=True, kw_only=True)
class _Colour:
    """One name."""

    colour: str = "red"


def _app() -> tuple[typer.Typer, list[object]]:
    seen: list[object] = []
    app = typer.Typer()

    @app.command()
    @with_groups
    def paint(name: str, *, first: bool = False, size: _Size, colour: _Colour, last: int = 7) -> None:
        """Paint something."""
        seen.append((name, first, size, colour, last))

    return app, seen


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], ("x", False, _Size(), _Colour(), 7)),
        (
            ["--high", "9", "--colour", "blue", "--last", "8", "--first"],
            ("x", True, _Size(height=9), _Colour(colour="blue"), 8),
        ),
        (["--width", "2"], ("x", False, _Size(width=2), _Colour(), 7)),
    ],
)
def test_each_field_is_an_option_with_its_default(arguments: list[str], expected: tuple[object, ...]) -> None:
    app, seen = _app()
    assert RUNNER.invoke(app, ["x", *arguments]).exit_code == 0
    assert seen == [expected]


def test_limits_and_help_of_fields_are_those_of_the_options() -> None:
    app, seen = _app()
    assert RUNNER.invoke(app, ["x", "--width", "0"]).exit_code == 2 and not seen
    text = RUNNER.invoke(app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).stdout
    places = [text.index(word) for word in ("--first", "--width", "--high", "--colour", "--last")]
    assert places == sorted(places)
    assert "Paint something." in text and "in pixels" in text and "--height" not in text
