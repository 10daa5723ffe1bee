"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file beside `path`, waits until it is on disk, and renames it; no moment leaves a part of it.

    Args:
        path: the file; its folder is made, an older file is replaced, and of a link what it points to.
        write: writes the content to the path it is given.

    Raises:
        OSError: if it can not be written; an older file is then as it was.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
        unfinished = Path(folder) / path.name
        write(unfinished)
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes text in UTF-8 with its line ends as they are, whole or not at all; see `write_whole`."""
    write_whole(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8", newline=""))
