"""Fill in the list of files on the page `code-map.md` from the modules' docstrings, so that it is never out of date."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent / "bgd_plugin"
_MARKER = "<!-- files:"


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page."""
    if page.file.src_uri != "code-map.md":
        return markdown
    head, marker, _tail = markdown.partition(_MARKER)
    assert marker, "code-map.md has no place for the files"
    return head + files_table()


def files_table() -> str:
    """A table for each folder: every file with the first line of its docstring."""
    lines = []
    for folder in [ROOT, *sorted(path for path in ROOT.rglob("*") if (path / "__init__.py").is_file())]:
        name = folder.relative_to(ROOT.parent).as_posix()
        lines += ["", f"### `{name}`", "", "| file | what it holds |", "|---|---|"]
        lines += [f"| `{file.name}` | {first_line(file)} |" for file in sorted(folder.glob("*.py"))]
    return "\n".join(lines) + "\n"


def first_line(file: Path) -> str:
    """The first sentence of a module's docstring, in one line of a table."""
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).replace("|", "\\|")
