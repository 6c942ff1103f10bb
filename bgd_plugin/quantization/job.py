"""Everything that the steps of one call of `quantize` share."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from bgd_plugin.calibration import Batches
from bgd_plugin.config import BGDConfig
from bgd_plugin.graph import FoundLayer, following_batchnorm, release_
from bgd_plugin.planning.types import Plan
from bgd_plugin.quantization.resume import Run
from bgd_plugin.report.report import LayerReport

__all__ = ["Job"]


@dataclass(kw_only=True)
class Job:
    """Everything that the steps of one call share."""

    student: nn.Module
    reference: nn.Module
    teacher: nn.Module
    config: BGDConfig
    plan: Plan
    found: list[FoundLayer]
    leftovers: Sequence[str]
    batches: Batches
    run: Run
    bar: Any
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    reports: list[LayerReport] = field(default_factory=list)
    shift_gains: list[float] = field(default_factory=list)
    unreached: list[FoundLayer] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Add the seconds of a block to a step's."""
        start = time.perf_counter()
        yield
        self.seconds[step] = self.seconds.get(step, 0.0) + time.perf_counter() - start

    def leave(self, index: int) -> None:
        """Let a layer stay float that no calibration input reaches."""
        self.unreached.append(self.found[index])
        release_(self.student, self.found[index])
        self.bar.update(1 + (self.config.distillation.steps if self.config.distillation else 0))

    def batchnorm_after(self, found: FoundLayer) -> str | None:
        """Path of the batch norm that alone reads a layer's output."""
        if found.kind.startswith("conv_transpose"):  # a row is not an output channel
            return None
        if isinstance(self.student, fx.GraphModule):
            return None if found.hidden else following_batchnorm(self.student, found.calls)
        return None if found.tied else self.norms.get(found.target)

    def generator(self, name: str) -> torch.Generator:
        """Random numbers of a layer, the same whichever layers were done before."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.config.seed} {name}".encode()))
