"""The commands that only show: `bgd-plugin inspect` a file, `bgd-plugin adapters`."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer

from bgd_plugin.cli.arguments import (
    Json,
    PQFile,
)

__all__ = ["adapters", "inspect"]


def inspect(file: PQFile, as_json: Json = False) -> None:
    """Show the contents of a compressed file. Needs no network."""
    from bgd_plugin.files.inspection import inspected, inspection_text

    content = inspected(file)
    typer.echo(json.dumps(content, indent=2) if as_json else inspection_text(content))


def adapters(as_json: Json = False) -> None:
    """List the adapters for other frameworks, their versions, and whether they can be imported."""
    from bgd_plugin.adapters import adapters as installed
    from bgd_plugin.support.tables import table

    found = installed()
    if as_json:
        typer.echo(json.dumps([asdict(adapter) for adapter in found], indent=2))
        return
    if not found:
        typer.echo("no adapter found: install bgd-plugin with pip")
        return
    rows = [[a.name, ", ".join(map(str, a.requirements)), a.problem or "can be imported"] for a in found]
    typer.echo(table(["adapter", "needs", "state"], rows))
