"""Fingerprints of a run's inputs, enough to say how another run differs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bgd_plugin.calibration import Batch
from bgd_plugin.config import BGDConfig
from bgd_plugin.support.digest import digest
from bgd_plugin.version import __version__

__all__ = ["described", "differing"]

_SHOWN = 3


def described(model: nn.Module, config: BGDConfig, batches: Sequence[Batch], teacher: nn.Module) -> dict[str, Any]:
    """Everything the result depends on, as JSON: part, name, then a fingerprint or the value."""
    network = _digests(model)
    description = {
        "version": {"bgd-plugin": __version__, "torch": str(torch.__version__)},
        "config": _flat(config.to_dict()),
        "network": network,
        "calibration": {f"batch {i}": digest(pytree.tree_leaves((b.args, b.kwargs))) for i, b in enumerate(batches)},
        "teacher": network if teacher is model else _digests(teacher),
    }
    result: dict[str, Any] = json.loads(json.dumps(description))
    return result


def differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """Describe each part that differs between two descriptions, such as "config (seed was 0, is 1)".

    Args:
        found: of the earlier run, as `described` returns it.
        wanted: of this run.
    """
    for part, entries in wanted.items():
        before = found.get(part)
        if before == entries:
            continue
        before = before if isinstance(before, dict) else {}
        names = [name for name in {**before, **entries} if before.get(name, _NONE) != entries.get(name, _NONE)]
        says_values = part in ("version", "config")
        what = [_change(name, before, entries) if says_values else name for name in names[:_SHOWN]]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"{part} ({', '.join(what)}{more})"


_NONE = object()


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    old, new = (json.dumps(values[name]) if name in values else "not there" for values in (before, now))
    return f"{name} was {old}, is {new}"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items() for k, v in _flat(inner, f"{prefix}.{name}".strip(".")).items()}


def _digests(module: nn.Module) -> dict[str, str]:
    return {"class": type(module).__name__} | {name: digest([value]) for name, value in module.state_dict().items()}
