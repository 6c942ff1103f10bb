"""The commands that only show: `bgd-plugin inspect` a file, `bgd-plugin adapters`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from bgd_plugin.cli.arguments import Json, PQFile

__all__ = ["adapters", "inspect"]


def inspect(file: PQFile, as_json: Json = False) -> None:
    """Show the contents of a compressed file. Needs no network."""
    from bgd_plugin.files.inspection import inspected, inspection_text

    content = inspected(file)
    typer.echo(json.dumps(content, indent=2) if as_json else inspection_text(content))


def adapters(
    as_json: Json = False,
    check: Annotated[bool, typer.Option("--check", help="import each framework as well, which takes longer")] = False,
) -> None:
    """List the adapters for other frameworks, the installed versions, and whether they are supported."""
    from bgd_plugin.adapters import adapters as installed
    from bgd_plugin.cli.quiet import quiet
    from bgd_plugin.support.tables import table

    with quiet() as noise:
        found = installed(imported=check)
    if any(adapter.problem for adapter in found):  # what a framework printed while it failed
        typer.echo("".join(noise), nl=False, err=True)
    if as_json:
        typer.echo(json.dumps([asdict(adapter) for adapter in found], indent=2))
        return
    if not found:
        typer.echo("no adapter found: install bgd-plugin with pip")
        return
    rows = [
        [a.name, ", ".join(map(str, a.requirements)), a.problem or ("can be imported" if check else "ready")]
        for a in found
    ]
    typer.echo(table(["adapter", "needs", "state"], rows))
