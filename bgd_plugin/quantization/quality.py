"""Keep a bound on the divergence: what was measured corrects what was expected, and the sizes are chosen again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from bgd_plugin.planning.survey import Survey
from bgd_plugin.report.report import Report

__all__ = ["Pass", "within_bound"]

_PASSES = 3
_MOST_PASSES = 6
"""Where no pass has kept the bound: each further one is more cautious."""
_GAP = 1.25
"""A file within the bound that is larger than one beyond it by such a factor may be much too large."""
_SLACK = 1.5, 2.0
"""A file whose divergence is this many times below the bound, after a pass, is larger than it need be."""


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one pass came to.

    Attributes:
        report: of the compressed network.
        survey: with the sizes of its layers.
        network: gives it; of several passes, only one is asked, and once.
        limit: the largest divergence that the bound allows, in the measure of the report's answers.
    """

    report: Report
    survey: Survey
    network: Callable[[], nn.Module]
    limit: float


def within_bound(run: Callable[[int, Pass | None], Pass | None]) -> Pass:
    """The pass with the smallest compressed network whose measured divergence is within a bound.

    Args:
        run: compresses; its arguments are the number of the pass, from 0, and the pass before it, whose measured
            divergence corrects what is expected. None: another pass is not worth its time.

    Returns:
        of three passes, of four where much lies between the files within the bound and beyond it, or as many as six
        until one keeps the bound, the smallest file within it; if none is, the one nearest to it, and its report says
        that the bound was missed. Where no sizes were chosen, the first pass's, as it is.
    """
    results: list[Pass] = []
    repeated = 0
    for number in range(_MOST_PASSES):
        result = run(number, results[-1] if results else None)
        if result is None:
            break
        if result.report.expected_divergence is None:  # nothing was chosen
            return result
        results.append(result)
        is_enough = _is_good_enough(result.report, result.limit, _SLACK[min(number, len(_SLACK) - 1)])
        repeated += any(_same_sizes(result.report, before.report) for before in results[:-1])
        is_kept = any(_is_within(one) for one in results)
        most = _PASSES + _is_open(results) if is_kept else _MOST_PASSES
        if is_enough or repeated > (0 if is_kept else 1) or number + 1 >= most:
            break
    return _best(results)


def _is_good_enough(report: Report, limit: float, slack: float) -> bool:
    """Whether no further pass is worth its time: the bound is kept, and not by more than a factor of `slack`."""
    answers, expected = report.answers, report.expected_divergence
    if answers is None or not expected or not answers.divergence:
        return True
    return limit / slack <= answers.divergence <= limit


def _is_within(result: Pass) -> bool:
    """Whether a pass keeps the bound."""
    answers = result.report.answers
    return answers is None or answers.divergence <= result.limit


def _is_open(results: list[Pass]) -> bool:
    """Whether much lies between the smallest file within the bound and the files beyond it."""
    within = [result.report.compressed_bytes for result in results if _is_within(result)]
    beyond = [result.report.compressed_bytes for result in results if not _is_within(result)]
    return bool(within and beyond) and min(within) > _GAP * max(beyond)


def _same_sizes(one: Report, other: Report) -> bool:
    sizes = [
        [(x.name, x.block_size, x.codebook_size, x.compressed_bytes) for x in report.layers] for report in (one, other)
    ]
    return sizes[0] == sizes[1]


def _best(results: list[Pass]) -> Pass:
    bound = results[0].limit

    def divergence(result: Pass) -> float:
        answers = result.report.answers
        return 0.0 if answers is None else answers.divergence

    within = [result for result in results if _is_within(result)]
    if within:
        best = min(
            reversed(within), key=lambda result: result.report.compressed_bytes
        )  # of equal ones the last knew more
        note = f"bound: kept, divergence {divergence(best):.3g} of {bound:.3g}"
    else:
        best = min(results, key=divergence)
        note = (
            f"bound: missed, divergence {divergence(best):.3g} where {bound:.3g} was asked for: give more calibration "
            "samples, or let more layers be chosen (first_layer, depthwise_conv, overrides)"
        )
    note += f", after {len(results)} passes" if len(results) > 1 else ""
    report = dataclasses.replace(best.report, notes=(*best.report.notes, note))
    return dataclasses.replace(best, report=report)
