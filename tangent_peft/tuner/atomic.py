"""A folder that is either all there or not there: written beside its place, moved into it at the end.

It knows nothing of models. A crash leaves at most a hidden `.NAME.….partial` folder; what was there before is moved
away only once the new folder is complete, and put back if moving fails.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_place(path: Path, overwrite: bool, marker: str) -> None:
    """Whether a new folder may take this place.

    Args:
        path: where the folder is wanted.
        overwrite: whether it may replace an earlier one.
        marker: name of the file that shows a folder to be an earlier one; no other folder is ever replaced.

    Raises:
        FileExistsError: for a file, a folder with content without `overwrite`, or one that lacks the marker.
        ValueError: for the current directory, one above it, or a mount point, which can not be moved.
    """
    place = path.resolve()
    if place.exists() and not place.is_dir():
        raise FileExistsError(f"{path} is a file. Name a folder that does not exist yet.")
    if place in (Path.cwd(), *Path.cwd().parents) or os.path.ismount(place):
        raise ValueError(f"{path} is the working directory, one above it, or a mount point. Name a folder in it.")
    content = sorted(entry.name for entry in place.iterdir()) if place.is_dir() else []
    if not content:
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists and holds {content[:3]} ({len(content)} entries). Name another folder, or pass "
            "`overwrite=True` to replace it."
        )
    if marker not in content:
        raise FileExistsError(
            f"{path} holds {content[:3]} ({len(content)} entries) but no {marker}: it is no earlier export, so "
            "`overwrite=True` does not replace it. Name another folder, or remove it yourself."
        )


@contextmanager
def fresh_folder(path: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `path` when the block ends without an error.

    Args:
        path: where the folder is wanted; the folders above it are made.
        overwrite: whether it may replace an earlier one.
        marker: as of `check_place`; the block has to write this file, too.

    Raises:
        FileExistsError: as `check_place`.
        ValueError: as `check_place`.
    """
    check_place(path, overwrite, marker)
    place = path.resolve()
    token = uuid.uuid4().hex[:8]
    partial = place.with_name(f".{place.name}.{token}.partial")
    partial.mkdir(parents=True)
    try:
        yield partial
        _flush(partial)
        check_place(path, overwrite, marker)  # someone else may have been faster
        _move(partial, place, place.with_name(f".{place.name}.{token}.replaced"))
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move(new: Path, place: Path, aside: Path) -> None:
    """Renames `new` to `place`; what was there is kept `aside` until then."""
    if not place.exists():
        new.rename(place)
    else:
        place.rename(aside)
        try:
            new.rename(place)
        except BaseException:
            aside.rename(place)
            raise
        shutil.rmtree(aside)
    _flush_one(place.parent)


def _flush(folder: Path) -> None:
    """Waits until all files are on the disk, so that the rename can not be there before them."""
    for entry in [*folder.rglob("*"), folder]:
        _flush_one(entry)


def _flush_one(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # only POSIX opens a directory
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
