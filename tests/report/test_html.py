"""Report pages: whole, self-contained, and safe against names."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.report.report import Report

_VOID = {"meta", "rect", "img", "br"}


class _Balanced(HTMLParser):
    """Follows opening and closing tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _layer(name: str, error: float = 0.01, weights: int = 4096) -> LayerReport:
    return LayerReport(
        name=name,
        kind="conv2d",
        block_size=4,
        codebook_size=256,
        weights=weights,
        bits_per_weight=6.0,
        compressed_bytes=3072,
        memory_bytes=100,
        relative_error=error,
        note="a <note>",
    )


def _report(*layers: LayerReport) -> Report:
    return Report(
        layers=layers,
        skipped=(SkippedLayer(name="<stem>", reason="first_layer=None & more"),),
        original_bytes=4_000_000,
        compressed_bytes=400_000,
        paper_bytes=390_000,
        seconds={"fit": 1.5},
        notes=("batch norm <matched>",),
    )


def _parsed(report: Report, folder: Path) -> tuple[str, _Balanced]:
    report.to_html(folder / "report.html")
    text = (folder / "report.html").read_text(encoding="utf-8")
    parser = _Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == []
    return text, parser


def test_a_page_shows_sizes_layers_and_reasons(tmp_path: Path) -> None:
    _, parser = _parsed(_report(_layer("one"), _layer("two", 0.5)), tmp_path)
    text = " ".join(parser.text)
    for word in ("3.815 MiB", "0.381 MiB", "10.0×", "one", "two", "50.00%", "first_layer=None & more", "fit 1.5"):
        assert word in text
    assert parser.seen.count("rect") == 6
    assert parser.seen.count("svg") == 1


def test_bars_are_in_proportion(tmp_path: Path) -> None:
    text, _ = _parsed(_report(_layer("one", 0.1), _layer("two", 0.4, weights=8192)), tmp_path)
    full = [float(w) for w in re.findall(r'class="pale"[^>]* width="([\d.]+)"', text)]
    errors = [float(w) for w in re.findall(r'class="warm"[^>]* width="([\d.]+)"', text)]
    assert full[1] == 2 * full[0]
    assert errors[1] == 4 * errors[0]


def test_names_are_escaped(tmp_path: Path) -> None:
    text, parser = _parsed(_report(_layer('<script>alert("x")</script>&')), tmp_path)
    assert "<script" not in text
    assert "script" not in parser.seen
    assert any('<script>alert("x")</script>&' in part for part in parser.text)


def test_a_page_asks_nothing_of_the_network(tmp_path: Path) -> None:
    text, _ = _parsed(_report(_layer("one")), tmp_path)
    assert not re.search(r"https?://|src=|@import|<link", text)


def test_all_errors_zero_and_no_layer(tmp_path: Path) -> None:
    _, parser = _parsed(_report(_layer("one", 0.0)), tmp_path)
    assert any("0.00%" in part for part in parser.text)
    _, parser = _parsed(_report(), tmp_path)
    assert "rect" not in parser.seen
