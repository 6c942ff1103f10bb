"""Validation helpers for settings."""

from __future__ import annotations

from typing import Any

from bgd_plugin.errors import ConfigError

__all__ = ["check", "check_budget", "check_choice", "check_codes", "check_share", "counts"]


def check(condition: bool, message: str) -> None:
    """Require a condition.

    Raises:
        ConfigError: with the message, if the condition is false.
    """
    if not condition:
        raise ConfigError(message)


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Require that the value of the setting called `name` is one of `choices`.

    Raises:
        ConfigError: naming the choices.
    """
    given = ", ".join(map(repr, choices[:-1]))
    check(value in choices, f"{name}={value!r}: give {given} or {choices[-1]!r}")


def check_share(name: str, value: Any, most: float) -> None:
    """Require that the value of the setting called `name` is a share of the samples.

    Args:
        name: as it is called in the message.
        value: what was given.
        most: the largest share allowed.

    Raises:
        ConfigError: saying what to give.
    """
    is_share = isinstance(value, (int, float)) and 0 <= value <= most
    check(is_share, f"{name}={value!r}: give a share of the samples, from 0 to {most}")


def counts(value: Any) -> bool:
    """Whether a value is an integer of at least 1."""
    return isinstance(value, int) and value >= 1


def check_budget(target_bytes: Any, target_ratio: Any, max_divergence: Any, default: float) -> None:
    """Require at most one of the three budgets, and a valid number for it.

    Args:
        target_bytes: maximum length of the file, an integer of at least 1.
        target_ratio: original bytes / file bytes, above 1.
        max_divergence: from the float network, in nats, above 0.
        default: the bound, in nats, that gives way to a budget.

    Raises:
        ConfigError: saying what to give.
    """
    given = {"target_bytes": target_bytes, "target_ratio": target_ratio, "max_divergence": max_divergence}
    if max_divergence == default and (target_bytes is not None or target_ratio is not None):
        del given["max_divergence"]
    given = {name: value for name, value in given.items() if value is not None}
    check(len(given) < 2, f"{' and '.join(f'{n}={v}' for n, v in given.items())}: give only one of them")
    is_bound = isinstance(max_divergence, (int, float)) and 0 < max_divergence < float("inf")
    check(
        max_divergence is None or is_bound,
        f"max_divergence={max_divergence!r}: give a positive number, such as 0.02, or None for no bound",
    )
    check(
        target_bytes is None or counts(target_bytes),
        f"target_bytes={target_bytes!r}: give an integer number of bytes, or None for no budget",
    )
    is_ratio = isinstance(target_ratio, (int, float)) and 1 < target_ratio < float("inf")
    check(
        target_ratio is None or is_ratio,
        f"target_ratio={target_ratio!r}: give a compression ratio above 1, such as 20 for a file 20 times smaller",
    )


def check_codes(codes: Any, *, has_budget: bool, preserve_zeros: bool) -> None:
    """Require a known form of codes, and settings that suit it.

    Args:
        codes: "blocks", "trellis" or "entropy".
        has_budget: whether bytes or a divergence are bounded, so that sizes are chosen.
        preserve_zeros: whether zeros are to be kept.

    Raises:
        ConfigError: saying what to give.
    """
    check_choice("codes", codes, ("blocks", "trellis", "entropy"))
    is_entropy = codes == "entropy"
    check(
        codes != "trellis" or has_budget,
        "codes='trellis' lets a budget choose between blocks and trellis codes: give target_bytes, target_ratio or "
        "max_divergence, too; for trellis codes in all linear layers give linear=LayerConfig(codes='trellis')",
    )
    check(
        not is_entropy or has_budget,
        "codes='entropy' has no fixed sizes: give target_bytes, target_ratio or max_divergence, too",
    )
    check(
        not is_entropy or not preserve_zeros,
        "codes='entropy' and preserve_zeros=True: entropy-coded codes have no masks; give codes='blocks'",
    )
