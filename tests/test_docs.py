"""The Python snippets of the README and the docs are run, block after block, in one namespace per page.

A block that cannot run here has a comment on the line above its fence: ``<!-- no-run: the reason -->``. A page that
needs a framework says so anywhere: ``<!-- needs: neural_compressor.torch -->``; without it, the page is skipped.
"""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.networks import SmallResNet

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

FENCE = re.compile(r"^(?P<indent>\s*)(?P<ticks>`{3,}|~{3,})\s*(?P<language>[\w+-]*)(?P<rest>.*)$")
NEEDS = re.compile(r"^<!--\s*needs:\s*(?P<module>[\w.]+)\s*-->\s*$", flags=re.MULTILINE)
NO_RUN = re.compile(r"^\s*<!--\s*no-run:(?P<reason>.*)-->\s*$")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block: its language, its code, the line where the code starts, and why it is not run, if it is not."""

    language: str
    code: str
    line: int
    reason: str | None


def blocks_of(text: str) -> Iterator[Block]:
    """The fenced blocks of a Markdown text, in order.

    Raises:
        ValueError: a fence that is never closed, or a ``no-run`` comment without a reason or without a block below it.
    """
    lines = text.splitlines()
    reason: str | None = None
    number = 0
    while number < len(lines):
        comment, fence = NO_RUN.match(lines[number]), FENCE.match(lines[number])
        if reason is not None and fence is None:
            raise ValueError(f"line {number}: a no-run comment must stand right above a fence")
        if comment is not None:
            reason = comment["reason"].strip()
            if not reason:
                raise ValueError(f"line {number + 1}: a no-run comment must give a reason")
        elif fence is not None:
            end = _closing_line(lines, number, fence["ticks"])
            code = textwrap.dedent("\n".join(lines[number + 1 : end]))
            yield Block(language=fence["language"].lower(), code=code, line=number + 2, reason=reason)
            reason, number = None, end
        number += 1
    if reason is not None:
        raise ValueError(f"line {number}: a no-run comment must stand right above a fence")


def _closing_line(lines: list[str], start: int, ticks: str) -> int:
    for number in range(start + 1, len(lines)):
        found = lines[number].strip()
        if len(found) >= len(ticks) and set(found) == {ticks[0]}:
            return number
    raise ValueError(f"line {start + 1}: this fence is never closed")


def python_blocks(text: str) -> list[Block]:
    """The blocks that are to be run."""
    return [
        block for block in blocks_of(text) if block.language in ("python", "py", "python3") and block.reason is None
    ]


def run(text: str, name: str) -> dict[str, object]:
    """Run a page's Python blocks in one namespace; line numbers in tracebacks are those of the page."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    for block in python_blocks(text):
        exec(compile("\n" * (block.line - 1) + block.code, name, "exec"), namespace)
    return namespace


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES if python_blocks(p.read_text(encoding="utf-8"))],
)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = page.read_text(encoding="utf-8")
    for module in NEEDS.findall(text):
        pytest.importorskip(module, reason=f"{module} is not installed")
    run(text, str(page))


def test_the_readme_s_first_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The block as it stands there, with a small network in the place of the pretrained one."""
    models, image = pytest.importorskip("torchvision.models"), pytest.importorskip("PIL.Image")
    block = next(b for b in blocks_of((ROOT / "README.md").read_text(encoding="utf-8")) if b.language == "python")
    assert len([line for line in block.code.splitlines() if line]) <= 12
    (tmp_path / "photos" / "a").mkdir(parents=True)
    for number in range(4):
        image.new("RGB", (96, 80), (40 * number, 90, 255 - 50 * number)).save(tmp_path / f"photos/a/{number}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "resnet18", lambda weights=None: SmallResNet())
    namespace: dict[str, object] = {}
    exec(compile(block.code.replace("target_ratio=20", "target_ratio=3"), "README.md", "exec"), namespace)
    assert isinstance(namespace["network"], torch.nn.Module)


def test_the_readme_has_snippets() -> None:
    assert python_blocks((ROOT / "README.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in PAGES])
def test_make_targets_in_shell_blocks_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = {target for line in makefile.splitlines() if line.startswith(".PHONY:") for target in line.split()[1:]}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.language in ("sh", "bash", "console"):
            for target in re.findall(r"^\s*(?:\$ )?make ([a-z][a-z-]*)", block.code, flags=re.MULTILINE):
                assert target in phony, f"{page.name}, line {block.line}: `make {target}` is no target of the Makefile"


def test_blocks_share_a_namespace_and_keep_their_order() -> None:
    assert run("```python\na = 1\n```\ntext\n```python\na = a + 1\n```\n", "page")["a"] == 2


def test_an_indented_block_is_run() -> None:
    assert run("* item\n\n    ```python\n    if True:\n        a = 3\n    ```\n", "page")["a"] == 3


def test_other_languages_and_fences_inside_fences_are_not_run() -> None:
    page = "```sh\nexit 1\n```\n````markdown\n```python\nraise SystemExit\n```\n````\n"
    assert [block.language for block in blocks_of(page)] == ["sh", "markdown"]
    assert python_blocks(page) == []


def test_a_failing_block_fails_with_its_own_line() -> None:
    with pytest.raises(ZeroDivisionError) as info:
        run("one\n\n```python\na = 0\n1 / a\n```\n", "page")
    assert info.traceback[-1].lineno + 1 == 5


def test_a_block_with_a_reason_is_not_run() -> None:
    page = "<!-- no-run: needs a GPU -->\n```python\nraise SystemExit\n```\n```python\na = 1\n```\n"
    assert [block.reason for block in blocks_of(page)] == ["needs a GPU", None]
    assert run(page, "page")["a"] == 1


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```python\na = 1\n", "line 1: this fence is never closed"),
        ("<!-- no-run: -->\n```python\n```\n", "line 1: a no-run comment must give a reason"),
        ("<!-- no-run: because -->\n\n```python\n```\n", "line 1: a no-run comment must stand right above a fence"),
        ("<!-- no-run: because -->\n", "line 1: a no-run comment must stand right above a fence"),
    ],
)
def test_a_malformed_page_is_an_error(page: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        list(blocks_of(page))
