"""The command line `bgd-plugin`: plan, quantize, export, inspect, evaluate, adapters, demo.

Slow imports are left to the commands that need them, so that `--help` responds at once. A user error prints a message
and exits with code 2; Ctrl-C prints one line and exits with code 130.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from bgd_plugin.cli.evaluate import evaluate
from bgd_plugin.cli.export import export
from bgd_plugin.cli.plan import plan
from bgd_plugin.cli.quantize import quantize
from bgd_plugin.cli.show import adapters, inspect
from bgd_plugin.errors import BGDError

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Turns user errors into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:  # the reader closed the pipe, as in `| head`: not a user error
            raise
        except (BGDError, OSError) as error:
            typer.echo(f"bgd-plugin: {error}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("bgd-plugin: stopped", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Compress trained networks by product quantization of their weights.",
)

for _command in (plan, quantize, export, inspect, evaluate, adapters):
    app.command()(_command)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="folder for the file, the photos and the report")] = Path("demo-report"),
) -> None:
    """Compress EfficientNet-Lite0, and compare it with the float network on 20 photos."""
    from bgd_plugin.cli.demo import run

    run(output)


def main() -> None:
    """The console script."""
    app()
