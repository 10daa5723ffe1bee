"""A sweep as a file: JSON with a version, written whole or not at all, checked when it is read.

Knows neither how the points came about nor who draws them.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tangent_peft.evaluate.sweep import EVALUATIONS, SweepPoint


FORMAT = "tangent_peft sweep"
VERSION = 1


@dataclass(frozen=True)
class SavedSweep:
    """What `load_sweep` reads.

    Attributes:
        points: what `sweep` returned.
        questions: the user messages that every point answered, in the order of its answers.
        labels: what a score means, in words with units, by scorer; more is better in each.
    """

    points: list[SweepPoint]
    questions: list[str] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)


def save_sweep(
    path: str | Path,
    points: Sequence[SweepPoint],
    questions: Sequence[str] = (),
    labels: Mapping[str, str] | None = None,
) -> None:
    """Writes a sweep as JSON; an interrupted call leaves the file that was there before, or none.

    Args:
        path: file to write; its folder is made. An older file is replaced.
        points: what `sweep` returned.
        questions: the user messages that were answered.
        labels: what a score means, in words with units, by scorer.

    Raises:
        ValueError: for no points, or a number that is not finite.
        OSError: if the file can not be written.
    """
    path = Path(path).resolve()  # of a link, what it points to
    if not points:
        raise ValueError(f"The sweep to be written to {path} has no points. Run `sweep` with at least one mix.")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "labels": dict(labels or {}),
        "questions": list(questions),
        "points": [point.to_dict() for point in points],
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"The sweep to be written to {path} holds a number that is not finite ({error}). Look at its scores: "
            "a scorer that knows no answer's value must not return NaN."
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(unfinished, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(unfinished, path)
    except BaseException:
        Path(unfinished).unlink(missing_ok=True)
        raise


def load_sweep(path: str | Path) -> SavedSweep:
    """Reads what `save_sweep` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a saved sweep, one of a later version, or damaged; the message says where.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no saved sweep {path}; `tangent_peft.evaluate.save_sweep` writes one.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # UnicodeDecodeError is one
        raise ValueError(f"{path} is not a saved sweep: it can not be read as JSON ({error}).") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is not a saved sweep: its `format` is not {FORMAT!r}. Write it by `save_sweep`.")
    if document.get("version") != VERSION:
        raise ValueError(
            f"{path} is a sweep of version {document.get('version')!r}; this release reads version {VERSION}. Use the "
            "release of tangent-peft that wrote it, or run the sweep again."
        )
    try:
        points = [_point(entry) for entry in document["points"]]
        questions, labels = _texts(document["questions"], "questions"), dict(document["labels"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Run the sweep again.") from None
    if not points:
        raise ValueError(f"{path} is damaged: it has no points. Run the sweep again.")
    return SavedSweep(points, questions, labels)


def _point(entry: Mapping[str, Any]) -> SweepPoint:
    if entry["evaluation"] not in EVALUATIONS:
        raise ValueError(f"evaluation {entry['evaluation']!r}")
    answers, lengths = _texts(entry["answers"], "answers"), entry["lengths"]
    if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
        raise ValueError(f"lengths {lengths!r}")
    if len(lengths) != len(answers):
        raise ValueError(f"{len(lengths)} lengths of {len(answers)} answers")
    return SweepPoint(
        weights=_numbers(entry["weights"]),
        evaluation=entry["evaluation"],
        scores=_numbers(entry["scores"]),
        answers=answers,
        lengths=lengths,
        gap=None if entry.get("gap") is None else _numbers({"gap": entry["gap"]})["gap"],
    )


def _texts(entries: Any, name: str) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{name} {entries!r}")
    return entries


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in entries.items()}
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}")
    return numbers
