"""The line chart: valid XML, every point at its place."""

from __future__ import annotations

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from bgd_plugin.support.charts import line_chart

SVG = "{http://www.w3.org/2000/svg}"


def _chart(points: list[tuple[float, float]], mark: tuple[float, float, str] | None = None) -> ElementTree.Element:
    text = line_chart(points, x_name="file", y_name="divergence <KL>", x_text=lambda x: f"{x:.0f} B", mark=mark)
    return ElementTree.fromstring(text)


@given(st.lists(st.tuples(st.floats(1, 1e12), st.floats(0, 1e6)), min_size=1, max_size=20), st.booleans())
def test_every_point_is_drawn_within_the_picture(points: list[tuple[float, float]], is_marked: bool) -> None:
    points = sorted(points)
    svg = _chart(points, (*points[0], "chosen & measured") if is_marked else None)
    circles = svg.findall(f"{SVG}circle")
    assert len(circles) == len(points) + is_marked
    for circle in circles:
        assert 0 <= float(circle.attrib["cx"]) <= 640
        assert 0 <= float(circle.attrib["cy"]) <= 320
    assert ("chosen & measured" in [text.text for text in svg.findall(f"{SVG}text")]) == is_marked


def test_both_axes_are_logarithmic() -> None:
    dots = _chart([(1, 1.0), (10, 0.1), (100, 0.01)]).findall(f"{SVG}circle")
    x, y = ([float(dot.attrib[name]) for dot in dots] for name in ("cx", "cy"))
    assert abs((x[1] - x[0]) - (x[2] - x[1])) < 0.2
    assert abs((y[1] - y[0]) - (y[2] - y[1])) < 0.2
    assert x[0] < x[1]
    assert y[0] < y[1]  # downwards: a smaller divergence is lower
