"""The batch norms of a run, corrected as they are reached, and what is to be said of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from bgd_plugin.calibration import Rerun, Walk
from bgd_plugin.gains import Gain
from bgd_plugin.graph import added_to
from bgd_plugin.job import Job
from bgd_plugin.training import correct_batchnorm_, correct_batchnorm_at_, is_shared

__all__ = ["DriftedSkip", "NormCorrection"]


@dataclass(frozen=True, kw_only=True)
class DriftedSkip:
    """The batch norm that ends a residual branch, and the other side of the addition."""

    norm: fx.Node
    node: fx.Node


class NormCorrection:
    """The batch norms of a walk, corrected one after another, and what is to be said of them."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._residual: set[str] = set()
        self._gains: dict[str, Gain] = {}
        self._shared: set[str] = set()

    def remember(self, skip: DriftedSkip | None) -> None:
        """The layer before this norm makes good what the skip has lost."""
        if skip is not None:
            self._residual.add(skip.norm.name)

    def correct_(self, walk: Walk, node: fx.Node) -> None:
        """Correct the batch norm at a node, as the settings say."""
        job, mode = self._job, self._job.config.batchnorm
        if mode == "keep":
            return
        assert isinstance(job.student, fx.GraphModule)
        if is_shared(job.student, node):
            self._shared.add(str(node.target))
            return
        with job.timed("batch norm"):
            skip = added_to(job.student, node) if node.name in self._residual else None
            gain = correct_batchnorm_(walk, node, mode, skip)
        if gain:
            walk.mark_changed(str(node.target))
            self._gains[node.name] = gain

    def correct_at_(self, walk: Rerun, path: str) -> None:
        """Correct the batch norm at a path of a network that is not a graph."""
        mode = self._job.config.batchnorm
        if mode == "keep":
            return
        if walk.runs_twice(path):
            self._shared.add(path)
            return
        with self._job.timed("batch norm"):
            gain = correct_batchnorm_at_(walk, path, mode)
        if gain:
            self._gains[path] = gain

    def notes(self) -> list[str]:
        """For the report."""
        mode, gains = self._job.config.batchnorm, list(self._gains.values())
        if mode == "keep":
            return []
        what = "nothing to correct, no batch norm follows a quantized layer"
        if gains:
            what = f"{len(gains)} corrected, {Gain.said(gains)}"
        notes = [f"batch norm ({mode}): {what}"]
        if self._shared:
            names = ", ".join(sorted(self._shared))
            notes.append(f"batch norm: left as they are, since they run at several places: {names}")
        return notes
