"""Inputs and log shared by the steps of one `quantize` call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.calibration import Batch, Batches, Records
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import FoundLayer, following_batchnorm
from bgd_plugin.planning.survey import Survey
from bgd_plugin.quantization.resume import Run
from bgd_plugin.support.log import Log
from bgd_plugin.support.seeds import seeded

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """The inputs of the steps of one call.

    Attributes:
        student: the network that is compressed in place.
        reference: the float network in the same form, for comparison.
        teacher: the network whose logits training matches; None if no training uses it.
        config: the settings.
        survey: the layers, and how each is quantized.
        norms: for a network without a graph, the path of the batch norm that follows a layer, by the layer's target.
        batches: the calibration data that the fit uses.
        aside: held-out calibration data; None if there are too few samples.
        run: progress on disk.
        bar: the progress bar.
        log: collects the seconds and notes of the steps.
        records: of the float network's runs on the batches, by the names of layers and norms; kept for further passes.
    """

    student: nn.Module
    reference: nn.Module
    teacher: nn.Module | None
    config: BGDConfig
    survey: Survey
    norms: Mapping[str, str] = field(default_factory=dict)
    batches: Batches
    aside: Sequence[Batch]
    run: Run
    bar: Any
    log: Log
    records: dict[Any, Records] = field(default_factory=dict)

    def batchnorm_after(self, found: FoundLayer) -> str | None:
        """Path of the batch norm that is the only reader of a layer's output."""
        if found.kind.startswith("conv_transpose"):  # a row is not an output channel
            return None
        if isinstance(self.student, fx.GraphModule):
            return None if found.hidden else following_batchnorm(self.student, found.calls)
        return None if found.tied else self.norms.get(found.target)

    def generator(self, *purpose: str) -> torch.Generator:
        """A random generator for a purpose, such as one layer's fit; independent of what was drawn for others."""
        return seeded(self.config.seed, *purpose)
