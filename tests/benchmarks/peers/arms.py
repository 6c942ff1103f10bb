"""The arms of the comparison: names, and how each compresses a network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import bgd_plugin as bgd
from bgd_plugin.results import Report
from tests.benchmarks.peers.build import Compressed, Quantizer, compress
from tests.benchmarks.peers.frameworks import coremltools_palettes, quanto, torchao_codebook
from tests.benchmarks.peers.grids import gptq, round_to_nearest
from tests.benchmarks.peers.subjects import Subject

__all__ = ["ARMS", "DEFAULT", "Arm"]

DEFAULT = "bgd_plugin"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to compress a network.

    Attributes:
        method: arms of one method are a curve in the plot.
        setting: what tells it from the others of its method.
        run: compresses.
    """

    method: str
    setting: str
    run: Callable[[Subject], Compressed]

    @property
    def name(self) -> str:
        """What `--arms` calls it."""
        return f"{self.method} {self.setting}"


def _library(config: bgd.BGDConfig) -> Callable[[Subject], Compressed]:
    def run(subject: Subject) -> Compressed:
        result = bgd.quantize(subject.model, subject.calibration, config, progress=False)
        _say(result.report)
        return Compressed(model=result.model, bytes=result.report.compressed_bytes)

    return run


def _say(report: Report) -> None:
    """What the run says of itself: what it expected, what it measured, and the seconds of each step."""
    expected = "" if report.expected_divergence is None else f"expected {report.expected_divergence:.3g}, "
    seconds = ", ".join(f"{step} {spent:.0f}" for step, spent in report.seconds.items())
    notes = "; ".join(note for note in report.notes if note.startswith(("bound", "budget")))
    print(f"{expected}{report.answers}; {notes}; seconds by the clock: {seconds}", flush=True)


def _peer(quantizer: Quantizer) -> Callable[[Subject], Compressed]:
    return lambda subject: compress(subject, quantizer)


def _sizes(conv: int, pointwise: int, codebook_size: int) -> dict[str, Any]:
    """Block sizes of 3×3 and of 1×1 and linear layers, and the codewords of all."""
    small = bgd.LayerConfig(block_size=pointwise, codebook_size=codebook_size)
    return {
        "conv": bgd.LayerConfig(block_size=conv, codebook_size=codebook_size),
        "pointwise_conv": small,
        "linear": small,
    }


# Original over compressed bytes. Not every network can be made so small, or is worth compressing so little.
_BUDGETS = (6.0, 7.5, 11.0, 20.0, 40.0)
_CODED_BUDGETS = (11.0, 40.0)
# d of 3×3 convolutions, d of 1×1 convolutions and linear layers, k
_SIZES = ((18, 8, 256), (9, 4, 64), (9, 4, 1024), (3, 2, 64), (3, 2, 256))
_PAPER_SIZES = ((18, 8, 256), (9, 4, 256), (3, 2, 64), (3, 2, 256))


def _arms() -> list[Arm]:
    arms = [Arm(method=DEFAULT, setting="default", run=_library(bgd.BGDConfig()))]
    fixed = _library(bgd.BGDConfig(max_divergence=None))
    arms.append(Arm(method=f"{DEFAULT}, sizes set", setting="max_divergence=None", run=fixed))
    for ratio in _BUDGETS:
        config = bgd.BGDConfig(target_ratio=ratio, freeze_norms=True)
        arms.append(Arm(method=DEFAULT, setting=f"target_ratio={ratio:g}", run=_library(config)))
    for ratio in _CODED_BUDGETS:
        config = bgd.BGDConfig(target_ratio=ratio, freeze_norms=True, codes="entropy")
        arms.append(Arm(method=f"{DEFAULT}, entropy-coded", setting=f"target_ratio={ratio:g}", run=_library(config)))
    for conv, pointwise, k in _SIZES:
        config = bgd.BGDConfig(**_sizes(conv, pointwise, k), freeze_norms=True, max_divergence=None)
        arms.append(Arm(method=f"{DEFAULT}, sizes set", setting=f"d={conv}/{pointwise} k={k}", run=_library(config)))
    for conv, pointwise, k in _PAPER_SIZES:
        config = bgd.BGDConfig(method="em", **_sizes(conv, pointwise, k), max_divergence=None)
        arms.append(Arm(method="paper EM", setting=f"d={conv}/{pointwise} k={k}", run=_library(config)))
    peers: dict[str, dict[str, Quantizer]] = {
        "RTN g32": {f"{bits}-bit": round_to_nearest(bits) for bits in (2, 3, 4, 8)},
        "GPTQ g32": {f"{bits}-bit": gptq(bits) for bits in (2, 3, 4)},
        "optimum-quanto": {kind: quanto(kind) for kind in ("qint2", "qint4")},
        "torchao codebook": {f"{bits}-bit": torchao_codebook(f"uint{bits}", 1) for bits in (2, 3, 4)}
        | {"d=4 k=256": torchao_codebook("uint8", 4)},
        "coremltools": {f"{bits}-bit": coremltools_palettes(bits) for bits in (2, 3, 4)}
        | {"d=4 k=256": coremltools_palettes(8, cluster_dim=4)},
    }
    for method, settings in peers.items():
        arms += [Arm(method=method, setting=setting, run=_peer(run)) for setting, run in settings.items()]
    return arms


ARMS = {arm.name: arm for arm in _arms()}
