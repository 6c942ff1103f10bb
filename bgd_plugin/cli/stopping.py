"""End a run by Ctrl-C or SIGTERM with one line that says how to resume it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

__all__ = ["says_how_to_go_on"]


class _Terminated(KeyboardInterrupt):
    """Raised on SIGTERM, which ends a run like Ctrl-C."""


def _terminated(*_: object) -> None:
    raise _Terminated


@contextmanager
def says_how_to_go_on(checkpoint: Path | None) -> Iterator[None]:
    """End Ctrl-C and SIGTERM with one line that says how to resume the run."""
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    except KeyboardInterrupt as error:
        how = (
            f"progress is saved in {checkpoint}; add --resume to the same command to continue"
            if checkpoint
            else "no progress saved; pass --checkpoint FOLDER to be able to resume"
        )
        typer.echo(f"\nbgd-plugin: stopped; {how}", err=True)
        raise typer.Exit(143 if isinstance(error, _Terminated) else 130) from error
    finally:
        signal.signal(signal.SIGTERM, before)
