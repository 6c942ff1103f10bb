"""Validation helpers for settings."""

from __future__ import annotations

from typing import Any

from bgd_plugin.errors import ConfigError

__all__ = ["check", "check_choice", "counts"]


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    given = ", ".join(map(repr, choices[:-1]))
    check(value in choices, f"{name}={value!r}: give {given} or {choices[-1]!r}")


def counts(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and value >= 1
