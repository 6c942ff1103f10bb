"""A line chart as SVG text: needs no other library, and no network when it is looked at."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

__all__ = ["line_chart"]

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 20, 50
_LEAST = 1e-6
"""Values below this are drawn here: a logarithmic axis has no zero."""
_STYLE = (
    ".axis{stroke:#888;stroke-width:1}.grid{stroke:#8884;stroke-width:.5}.line{fill:none;stroke:#2a6fbb;stroke-width:2}"
    ".dot{fill:#2a6fbb}.mark{fill:#c8501e}.text{font:12px system-ui,sans-serif;fill:#777}"
)


def line_chart(
    points: Sequence[tuple[float, float]],
    *,
    x_name: str,
    y_name: str,
    x_text: Callable[[float], str],
    mark: tuple[float, float, str] | None = None,
) -> str:
    """A line through points, both axes logarithmic.

    Args:
        points: pairs of x and y, x ascending, at least one; x above 0, a y below 1e-6 is drawn at 1e-6.
        x_name, y_name: titles of the axes.
        x_text: how an x is written at the axis.
        mark: one more highlighted point, its x and y in the units of `points`, and its label.

    Returns:
        an `<svg>` element.
    """
    marked = [*points, *([(mark[0], mark[1])] if mark else [])]
    x_range = _logs([x for x, _ in marked])
    y_range = _logs([max(y, _LEAST) for _, y in marked])

    def place(x: float, y: float) -> tuple[float, float]:
        across = _share(x, x_range) * (_WIDTH - _LEFT - _RIGHT)
        up = _share(max(y, _LEAST), y_range) * (_HEIGHT - _TOP - _BOTTOM)
        return _LEFT + across, _HEIGHT - _BOTTOM - up

    parts = [*_axes(x_range, y_range, place, x_text, x_name, y_name)]
    placed = [place(x, y) for x, y in points]
    parts.append(f'<polyline class="line" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in placed)}"/>')
    parts += [f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in placed]
    if mark:
        x, y = place(mark[0], mark[1])
        side, anchor = (-10, "end") if x > _WIDTH / 2 else (10, "start")
        parts.append(f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="6"/>')
        parts.append(_text(x + side, max(_TOP + 10, y - 8), mark[2], anchor))
    size = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" width="100%" style="max-width:{_WIDTH}px"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" {size}><style>{_STYLE}</style>' + "".join(parts) + "</svg>"
    )


def _axes(
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    place: Callable[[float, float], tuple[float, float]],
    x_text: Callable[[float], str],
    x_name: str,
    y_name: str,
) -> list[str]:
    left, bottom, right, top = _LEFT, _HEIGHT - _BOTTOM, _WIDTH - _RIGHT, _TOP
    parts = [f'<path class="axis" fill="none" d="M{left} {top}V{bottom}H{right}"/>']
    for step in range(5):
        x = math.exp(x_range[0] + step / 4 * (x_range[1] - x_range[0]))
        parts.append(_text(place(x, 1)[0], bottom + 18, x_text(x), "middle"))
    for power in range(math.ceil(y_range[0] / math.log(10)), math.floor(y_range[1] / math.log(10)) + 1):
        y = place(math.exp(x_range[0]), 10.0**power)[1]
        parts.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        parts.append(_text(left - 8, y + 4, f"{10.0**power:g}", "end"))
    parts.append(_text((left + right) / 2, _HEIGHT - 10, x_name, "middle"))
    parts.append(_text(left, top - 6, y_name, "start"))
    return parts


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text class="text" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _logs(values: Sequence[float]) -> tuple[float, float]:
    """The range of the logarithms, with a little room."""
    low, high = math.log(min(values)), math.log(max(values))
    room = 0.05 * (high - low) or 0.5
    return low - room, high + room


def _share(value: float, logs: tuple[float, float]) -> float:
    return (math.log(value) - logs[0]) / (logs[1] - logs[0])
