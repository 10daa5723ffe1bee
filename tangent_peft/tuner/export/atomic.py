"""A folder that is either all there or not there: written beside its place, moved into it at the end.

It knows nothing of models. What was there before is moved aside only once the new folder is complete, and put back if
moving fails. A process that is killed leaves at most hidden folders: `.NAME.….partial`, the new one, and, between the
two renames, `.NAME.….replaced`, the old one, with nothing at the place itself.
"""

from __future__ import annotations

import json
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
        marker: name of the file that shows a folder to be an earlier one; no other folder is ever replaced. It is
            JSON, and lists under "files" what was written: a folder that holds another file is not replaced either.

    Raises:
        FileExistsError: for a file, a folder with content without `overwrite`, one that lacks the marker, or one with
            files that the marker does not list.
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
    others = sorted(files_in(place) - _listed(place / marker) - {marker})
    if others:
        raise FileExistsError(
            f"{path} holds an earlier export and {others[:3]} ({len(others)} files), which its {marker} does not list "
            "as part of it, so `overwrite=True` does not delete them. Name another folder, or move them away yourself."
        )


def files_in(folder: Path) -> set[str]:
    """All files below a folder, as paths relative to it with slashes; links are files, and not followed."""
    files = (entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir())
    return {file.relative_to(folder).as_posix() for file in files}


def _listed(marker: Path) -> set[str]:
    """The files that a marker lists; none if it is of a version that listed none, or can not be read."""
    try:
        record = json.loads(marker.read_text(encoding="utf-8"))
    except ValueError:
        return set()
    return set(record.get("files", [])) if isinstance(record, dict) else set()


@contextmanager
def fresh_folder(path: Path, overwrite: bool, marker: str) -> Iterator[Path]:
    """Yields an empty folder to write into, which becomes `path` when the block ends without an error.

    Args:
        path: where the folder is wanted; the folders above it are made.
        overwrite: whether it may replace an earlier one.
        marker: as of `check_place`; the block has to write this file, too, as the last one.

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
        shutil.rmtree(aside, ignore_errors=True)
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
