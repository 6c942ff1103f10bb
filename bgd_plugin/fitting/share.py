"""Fit a layer in one process and send the result to all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bgd_plugin.fitting.method import FittedLayer
from bgd_plugin.support.processes import from_first

__all__ = ["fitted_once"]

_NOTHING = ""


def fitted_once(work: Callable[[], FittedLayer | None]) -> FittedLayer | None:
    """Call `work` in the first process only, and return its result in every process.

    Raises:
        BGDError: `work` raised one in the first process.
    """

    def taken_apart() -> tuple[dict[str, Tensor], str]:
        fit = work()
        if fit is None:
            return {}, _NOTHING
        values = {f.name: getattr(fit, f.name) for f in dataclasses.fields(fit)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        return tensors, json.dumps({name: value for name, value in values.items() if name not in tensors})

    tensors, text = from_first(taken_apart)
    if text == _NOTHING:
        return None
    values: dict[str, Any] = {**tensors, **json.loads(text)}
    return FittedLayer(**(values | {"warnings": tuple(values["warnings"])}))
