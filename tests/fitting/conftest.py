"""What the fit is called with."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from torch import Tensor

from bgd_plugin.fitting import method_full_gram as full_gram


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of every call of `fit_full`, by name."""
    real, seen = full_gram.fit_full, list[dict[str, Any]]()

    def watched(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(real).bind(*args, **kwargs)
        bound.apply_defaults()
        seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in bound.arguments.items()})
        return real(*args, **kwargs)

    monkeypatch.setattr(full_gram, "fit_full", watched)
    return seen
