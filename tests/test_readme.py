"""Runs the Python of README.md and of the documentation, so that what is printed there works.

A block is run if its fence says so (```` ```python test ````) or the comment `<!-- test -->` stands on the
line above. The blocks of one file run in order and share their names, beginning with `base`, `tokenizer` and
`pairs`, in an empty working directory. Blocks that are not marked are only compiled.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if page.is_file()]
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.relative_to(ROOT).as_posix() for page in PAGES])

FENCE = re.compile(
    r"(?P<marked>^[ ]*<!--[ ]*test[ ]*-->[ ]*\n)?"
    r"^(?P<indent>[ ]*)```[ ]*python(?P<info>(?:[ ][^\n`]*)?)\n"
    r"(?P<code>.*?)"
    r"^(?P=indent)```[ ]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A block of Python: its code, the line of the page on which it begins, and whether it is to be run."""

    code: str
    line: int
    tested: bool

    def compile(self, page: str) -> Any:
        """Code whose tracebacks name the lines of the page."""
        return compile("\n" * (self.line - 1) + self.code, page, "exec")


def blocks(text: str) -> list[Block]:
    return [
        Block(
            code=textwrap.dedent(match["code"]),
            line=text.count("\n", 0, match.start("code")) + 1,
            tested=bool(match["marked"]) or "test" in match["info"].split(),
        )
        for match in FENCE.finditer(text)
    ]


def test_finds_marked_and_unmarked_blocks() -> None:
    text = """
```python test
a = 1
```
<!-- test -->
```python
b = a
```
- in a list:
    ```python title="x"
    if b:
        c = b
    ```
```pythonic
no
```
"""
    expected = [("a = 1\n", 3, True), ("b = a\n", 7, True), ("if b:\n    c = b\n", 11, False)]
    assert [(block.code, block.line, block.tested) for block in blocks(text)] == expected


@each_page
def test_every_block_is_python(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        block.compile(page.name)


@each_page
def test_marked_blocks_run(
    page: Path,
    tiny_llama: Callable[[], Any],
    tokenizer: Any,
    pairs: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    marked = [block for block in blocks(page.read_text(encoding="utf-8")) if block.tested]
    if not marked:
        pytest.skip(f"{page.name} marks no block to be run")
    monkeypatch.chdir(tmp_path)
    names = {"base": tiny_llama(), "tokenizer": tokenizer, "pairs": pairs}
    for block in marked:
        exec(block.compile(page.name), names)


@pytest.mark.skipif(not (ROOT / "README.md").is_file(), reason="README.md is not there")
def test_readme_shows_code_that_runs() -> None:
    assert any(block.tested for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")))
