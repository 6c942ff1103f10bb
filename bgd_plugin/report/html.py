"""Self-contained HTML reports: sizes, and the layers as a bar chart and a table.

All text from outside (layer names, reasons) is escaped where it enters a page.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from bgd_plugin.planning.types import SkippedLayer
from bgd_plugin.pq.forms import TRELLIS
from bgd_plugin.report.layer import LayerReport
from bgd_plugin.support.tables import mib, percent

__all__ = ["bars", "cards", "details", "layer_sections", "page", "table", "write_page"]

_FLOAT_BYTES = 4
_LONGEST_NAME = 36  # characters

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b7a; --paper: #f6f7f9; --card: #fff; --line: #e1e6eb;
  --pale: #cfdbe2; --main: #00796b; --warm: #d9822b; --good: #2e7d32; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaee; --soft: #9aa7b4; --paper: #14191f; --card: #1d242c;
  --line: #2e3843; --pale: #3b4a56; --main: #4db6ac; --warm: #f0a35a; --good: #81c784; --bad: #ef9a9a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .35rem; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .5rem; }
p { margin: .4rem 0; max-width: 75ch; } .lead, .note { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0 .6rem; }
.cards div { flex: 1 1 150px; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.45rem; line-height: 1.3; white-space: nowrap; }
.cards span { color: var(--soft); font-size: .85rem; }
.box { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .8rem 1rem;
  overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--soft); font-weight: 600; }
th, td { padding: .25rem .7rem .25rem 0; white-space: nowrap; }
td { border-top: 1px solid var(--line); } .num { text-align: right; } td.wrap { white-space: normal; }
svg { display: block; width: 100%; min-width: 680px; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); }
.pale { fill: var(--pale); } .main { fill: var(--main); }
.warm { fill: var(--warm); }
summary { cursor: pointer; margin: 2rem 0 .5rem; font-size: 1.15rem; font-weight: bold; }
code { font-size: .9em; } pre { overflow-x: auto; margin: 0; }
"""


def write_page(
    path: str | os.PathLike[str],
    sizes: Sequence[tuple[str, str]],
    layers: Sequence[LayerReport],
    skipped: Sequence[SkippedLayer],
    notes: Sequence[str],
    seconds: Mapping[str, float],
    chart: str = "",
) -> None:
    """Write a report as one page: sizes, bytes and error of each layer, and what was left float and why.

    Args:
        path: of the file.
        sizes: figures to be shown large, each with a line below; the first two are float and compressed size.
        layers, skipped, notes, seconds: as of `Report`.
        chart: an `<svg>` element, the curve of bytes against divergence; empty where there is none.
    """
    title = f"{sizes[0][0]} → {sizes[1][0]}"
    body = [
        f"<h1>Compressed network: {escape(title)}</h1>",
        '<p class="lead">Product quantization of the weights, layer by layer.</p>',
        cards(sizes),
        *(["<h2>Where the file stands</h2>", chart] if chart else []),
        *layer_sections(layers, skipped, notes, seconds),
    ]
    Path(path).write_text(page(f"Compressed network: {title}", body), encoding="utf-8")


def page(title: str, body: Sequence[str], style: str = "") -> str:
    """A complete page; `body` and `style` are markup, `title` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def cards(values: Sequence[tuple[str, str]]) -> str:
    """Key figures: pairs of values and captions."""
    return (
        '<div class="cards">'
        + "".join(f"<div><b>{escape(v)}</b><span>{escape(w)}</span></div>" for v, w in values)
        + "</div>"
    )


def layer_sections(
    layers: Sequence[LayerReport], skipped: Sequence[SkippedLayer], notes: Sequence[str], seconds: Mapping[str, float]
) -> list[str]:
    """The sections about layers: chart, table, layers left float, notes, and the seconds spent on each step."""
    sections = [
        "<h2>Bytes and error, layer by layer</h2>",
        '<p class="note">Left: size of the layer in float (pale) and compressed (solid). Right: the relative error '
        "of the layer's outputs on the calibration data, ‖X(W − Ŵ)ᵀ‖² / ‖XWᵀ‖². Layers are in the order in which "
        "they run.</p>",
        f'<div class="box">{bars(layers)}</div>',
        details("Figures of each layer", _layer_table(layers)),
    ]
    if skipped:
        rows = [[s.name, s.reason] for s in skipped]
        sections.append(details(f"Left float: {len(rows)} layers", table(["layer", "reason"], rows, wrap=1)))
    lines = [*notes]
    if seconds:
        lines.append("Seconds: " + ", ".join(f"{step} {spent:.1f}" for step, spent in seconds.items()))
    sections += ["<h2>Notes</h2>"] * bool(lines) + [f'<p class="note">{escape(line)}</p>' for line in lines]
    return sections


def bars(layers: Sequence[LayerReport]) -> str:
    """Bytes (float and compressed) and relative error of each layer, as an SVG chart."""
    row, top, bytes_left, bytes_width, error_left, error_width = 19, 26, 250, 270, 640, 220
    largest = max((_FLOAT_BYTES * x.weights for x in layers), default=1)
    worst = max((x.relative_error for x in layers), default=0) or 1
    parts = [
        f'<text class="soft" x="{bytes_left}" y="14">size</text>',
        f'<text class="soft" x="{error_left}" y="14">relative error of the outputs</text>',
    ]
    for index, x in enumerate(layers):
        y = top + index * row
        full = bytes_width * _FLOAT_BYTES * x.weights / largest
        size = mib(x.compressed_bytes)
        packed = bytes_width * x.compressed_bytes / largest
        error = error_width * x.relative_error / worst
        codes = f"blocks of {x.block_size}, {x.looked_up_in} codewords" if x.codes != TRELLIS else "trellis codes"
        before, after = mib(_FLOAT_BYTES * x.weights), mib(x.compressed_bytes)
        tip = f"{x.name}: {before} → {after}, {codes}, error {percent(x.relative_error)}"
        parts.append(
            f"<g><title>{escape(tip)}</title>"
            f'<text x="{bytes_left - 10}" y="{y + 11}" text-anchor="end">{escape(_shortened(x.name))}</text>'
            f'<rect class="pale" x="{bytes_left}" y="{y + 1}" width="{full:.1f}" height="13" rx="2"/>'
            f'<rect class="main" x="{bytes_left}" y="{y + 1}" width="{max(packed, 1):.1f}" height="13" rx="2"/>'
            f'<text class="soft" x="{bytes_left + max(full, packed) + 6:.1f}" y="{y + 11}">{size}</text>'
            f'<rect class="warm" x="{error_left}" y="{y + 1}" width="{max(error, 0.5):.1f}" height="13" rx="2"/>'
            f'<text class="soft" x="{error_left + error + 6:.1f}" y="{y + 11}">{percent(x.relative_error)}</text></g>'
        )
    height = top + row * len(layers) + 4
    return (
        f'<svg viewBox="0 0 930 {height}" role="img" aria-label="bytes and error of each layer">{"".join(parts)}</svg>'
    )


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]


def _layer_table(layers: Sequence[LayerReport]) -> str:
    header = ["layer", "kind", "weights", "block", "codebook", "bits/weight", "size", "error", "note"]
    rows = [
        [x.name, x.kind, f"{x.weights:,}", x.block_size, x.looked_up_in, f"{x.bits_per_weight:.2f}"]
        + [mib(x.compressed_bytes), percent(x.relative_error), "; ".join(filter(None, (x.note, x.advice)))]
        for x in layers
    ]
    return table(header, rows, numbers=range(2, 8), wrap=8)


def table(
    header: Sequence[str], rows: Sequence[Sequence[object]], *, numbers: Sequence[int] = (), wrap: int = -1
) -> str:
    """A table of a header and rows of text: the columns `numbers` are right-aligned, the column `wrap` may wrap."""
    kinds = [' class="num"' if i in numbers else ' class="wrap"' if i == wrap else "" for i in range(len(header))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(header, kinds, strict=True))
    lines = [
        "<tr>" + "".join(f"<td{k}>{escape(str(cell))}</td>" for cell, k in zip(cells, kinds, strict=True)) + "</tr>"
        for cells in rows
    ]
    return f"<table><tr>{head}</tr>{''.join(lines)}</table>"


def details(summary: str, content: str) -> str:
    """A collapsible section; the summary is text, the content is markup."""
    return f'<details><summary>{escape(summary)}</summary><div class="box">{content}</div></details>'
