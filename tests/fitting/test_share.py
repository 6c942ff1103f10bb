"""A fit that the first process makes is every process's, bit for bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from bgd_plugin.errors import CalibrationError
from bgd_plugin.fitting import share
from bgd_plugin.fitting.method import FittedLayer
from bgd_plugin.fitting.share import fitted_once

PLAIN = FittedLayer(codebook=torch.randn(4, 2), codes=torch.randint(0, 4, (3, 5)))
WHOLE = dataclasses.replace(PLAIN, row_scale=torch.rand(3), bias_shift=torch.rand(3), warnings=("a", "b"))


def _same(one: FittedLayer, other: FittedLayer) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one)]
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b and type(a) is type(b) for a, b in pairs)


@pytest.mark.parametrize("fit", [PLAIN, WHOLE])
def test_what_the_first_process_sends_is_put_together_again(fit: FittedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def from_first(work: Any) -> Any:
        tensors, text = work()
        assert all(isinstance(value, Tensor) for value in tensors.values()) and isinstance(text, str)
        sent.append(tensors)
        return {name: value.clone() for name, value in tensors.items()}, text

    monkeypatch.setattr(share, "from_first", from_first)
    found = fitted_once(lambda: fit)
    assert found is not None and _same(found, fit) and found.codebook is not fit.codebook
    assert set(sent[0]) == {f.name for f in dataclasses.fields(fit) if isinstance(getattr(fit, f.name), Tensor)}


def test_other_processes_do_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    content: list[Any] = []
    monkeypatch.setattr(share, "from_first", lambda work: content.append(work()) or content[0])
    fitted_once(lambda: WHOLE)
    monkeypatch.setattr(share, "from_first", lambda work: content[0])

    def never() -> FittedLayer:
        raise AssertionError("only the first process works")

    found = fitted_once(never)
    assert found is not None and _same(found, WHOLE)


def test_nothing_and_errors_are_passed_on() -> None:
    assert fitted_once(lambda: None) is None

    def fails() -> FittedLayer:
        raise CalibrationError("layer 'x' cannot be fitted")

    with pytest.raises(CalibrationError, match="layer 'x'"):
        fitted_once(fails)
