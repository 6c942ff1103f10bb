"""Correct the batch norms of a run as they are reached, and collect notes for the report."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from torch import fx, nn

from bgd_plugin.calibration import Rerun, Walk
from bgd_plugin.correction.batchnorm import correct_batchnorm_, correct_batchnorm_at_, is_shared
from bgd_plugin.correction.gain import Gain
from bgd_plugin.graph import added_to

__all__ = ["DriftedSkip", "NormCorrection"]


@dataclass(frozen=True, kw_only=True)
class DriftedSkip:
    """The batch norm (`norm`) that ends a residual branch, and the other input (`node`) of the addition."""

    norm: fx.Node
    node: fx.Node


class NormCorrection:
    """Corrects the batch norms of a walk one after another, and collects notes for the report.

    Args:
        student: the network whose batch norms are corrected.
        mode: `BGDConfig.batchnorm`.
        timed: returns a context that adds its seconds to the named step's.
    """

    def __init__(
        self,
        student: nn.Module,
        mode: Literal["matched", "reestimate", "keep"],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._student = student
        self._mode = mode
        self._timed = timed
        self._residual: set[str] = set()
        self._gains: dict[str, Gain] = {}
        self._shared: set[str] = set()

    def remember(self, skip: DriftedSkip | None) -> None:
        """Record that the layer before this norm compensates for the skip's drift."""
        if skip is not None:
            self._residual.add(skip.norm.name)

    def correct_(self, walk: Walk, node: fx.Node) -> None:
        """Correct the batch norm at a node according to the settings."""
        mode = self._mode
        if mode == "keep":
            return
        assert isinstance(self._student, fx.GraphModule)
        if is_shared(self._student, node):
            self._shared.add(str(node.target))
            return
        with self._timed("batch norm"):
            skip = added_to(self._student, node) if node.name in self._residual else None
            gain = correct_batchnorm_(walk, node, mode, skip)
        if gain:
            self._gains[str(node.target)] = gain

    def correct_at_(self, walk: Rerun, path: str) -> None:
        """Correct the batch norm at a path of a network that is not a graph."""
        mode = self._mode
        if mode == "keep":
            return
        if walk.runs_twice(path):
            self._shared.add(path)
            return
        with self._timed("batch norm"):
            gain = correct_batchnorm_at_(walk, path, mode)
        if gain:
            self._gains[path] = gain

    def notes(self) -> list[str]:
        """Notes for the report."""
        mode, gains = self._mode, list(self._gains.values())
        if mode == "keep":
            return []
        what = "nothing to correct: no batch norm follows a quantized layer"
        kept = [gain for gain in gains if not gain.taken_back]
        if gains:
            what = f"{len(kept)} corrected" + (f", {Gain.said(kept)}" if kept else "")
        notes = [f"batch norm ({mode}): {what}"]
        undone = ", ".join(name for name, gain in self._gains.items() if gain.taken_back)
        if undone:
            notes.append(f"batch norm: undone, because it did harm on samples kept aside: {undone}")
        if self._shared:
            names = ", ".join(sorted(self._shared))
            notes.append(f"batch norm: not corrected, because they are called at several places: {names}")
        return notes
