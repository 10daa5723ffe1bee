"""What mkdocs does beside rendering: the README becomes the front page, and marks for the tests disappear."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any


MARK = "<!-- README.md -->"
# What `tests/test_readme.py` looks for; a fence with a second word would not be rendered as code.
TESTED = re.compile(r"^(?P<fence> *``` ?python) test\b|^ *<!-- test -->\n", re.MULTILINE)
# [text](target) and ![text](target), where the target is a path inside the repository.
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?!https?:|mailto:|#)(?P<target>[^)\s]+)\)")

log = logging.getLogger("mkdocs.hooks.readme")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    """Replaces the mark on a page by the README, its links as they are seen from `docs/`."""
    if MARK in markdown:
        readme = Path(config["config_file_path"]).parent / "README.md"
        if readme.is_file():
            markdown = markdown.replace(MARK, LINK.sub(_from_docs, readme.read_text(encoding="utf-8")))
        else:
            log.warning("README.md is missing, and the front page with it.")
    return TESTED.sub(lambda mark: mark["fence"] or "", markdown)


def _from_docs(link: re.Match[str]) -> str:
    """A page or picture under docs/ keeps its link; a file that the site does not hold is only named."""
    target = link["target"]
    if target.startswith("docs/"):
        return f"{link['image']}[{link['text']}]({target.removeprefix('docs/')})"
    return link["text"]
