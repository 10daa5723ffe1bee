"""A sweep as files: JSON with a version, and a tidy CSV; each written whole or not at all, the JSON checked when read.

Knows neither how the points came about nor who draws them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_peft.evaluate.chats import messages
from tangent_peft.evaluate.scorers import Prompt
from tangent_peft.evaluate.sweeps.table import EVALUATIONS, SweepPoint, SweepTable
from tangent_peft.tuner.files import write_text


FORMAT = "tangent_peft sweep"
VERSION = 2  # 1, read as well, has points without diagnostics, values and intervals, and its prompts are texts


def save_sweep(path: str | Path, table: SweepTable) -> None:
    """Writes a sweep as JSON; an interrupted call leaves the file that was there before, or none.

    Args:
        path: file to write; its folder is made. An older file is replaced.
        table: what `sweep` returned.

    Raises:
        ValueError: for no points, or a number that is not finite.
        OSError: if the file can not be written.
    """
    if not table.points:
        raise ValueError(f"The sweep to be written to {path} has no points. Run `sweep` with at least one mix.")
    document = {
        "format": FORMAT,
        "version": VERSION,
        "settings": table.settings,
        "labels": table.labels,
        "higher_is_better": table.higher_is_better,
        "prompts": [prompt if isinstance(prompt, str) else [dict(m) for m in prompt] for prompt in table.prompts],
        "points": [point.to_dict() for point in table.points],
    }
    try:
        text = json.dumps(document, indent=1, allow_nan=False)
    except ValueError as error:
        raise ValueError(
            f"The sweep to be written to {path} holds a number that is not finite ({error}). Look at its scores: "
            "a scorer that knows no answer's value must not return NaN."
        ) from None
    write_text(Path(path), text)


def save_sweep_csv(path: str | Path, table: SweepTable) -> None:
    """Writes `table.rows()` as CSV: one row per point and number; whole or not at all.

    Raises:
        ValueError: for no points.
        OSError: if the file can not be written.
    """
    rows = table.rows()
    if not rows:
        raise ValueError(f"The sweep to be written to {path} has no numbers. Run `sweep` with at least one mix.")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(Path(path), text.getvalue())


def load_sweep(path: str | Path) -> SweepTable:
    """Reads what `save_sweep` wrote, also in earlier releases.

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
    if document.get("version") not in (1, VERSION):
        raise ValueError(
            f"{path} is a sweep of version {document.get('version')!r}; this release reads versions 1 to {VERSION}. "
            "Use the release of tangent-peft that wrote it, or run the sweep again."
        )
    try:
        table = _table(document)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}. Run the sweep again.") from None
    if not table.points:
        raise ValueError(f"{path} is damaged: it has no points. Run the sweep again.")
    return table


def _table(document: Mapping[str, Any]) -> SweepTable:
    points, labels = [_point(entry) for entry in document["points"]], dict(document["labels"])
    if document["version"] == 1:
        return SweepTable(points, list(_texts(document["questions"], "questions")), labels)
    return SweepTable(
        points, _prompts(document["prompts"]), labels, dict(document["higher_is_better"]), dict(document["settings"])
    )


def _prompts(entries: Sequence[Any]) -> list[Prompt]:
    if not isinstance(entries, list):
        raise ValueError(f"prompts {entries!r}")
    for index, entry in enumerate(entries):
        messages(entry, index)
    return entries


def _point(entry: Mapping[str, Any]) -> SweepPoint:
    if entry["evaluation"] not in EVALUATIONS:
        raise ValueError(f"evaluation {entry['evaluation']!r}")
    answers, lengths = _texts(entry["answers"], "answers"), entry["lengths"]
    if not isinstance(lengths, list) or not all(type(length) is int for length in lengths):
        raise ValueError(f"lengths {lengths!r}")
    if len(lengths) != len(answers):
        raise ValueError(f"{len(lengths)} lengths of {len(answers)} answers")
    intervals = {}
    for name, (low, high) in entry.get("intervals", {}).items():
        intervals[name] = (_number(name, low), _number(name, high))
    return SweepPoint(
        weights=_numbers(entry["weights"]),
        evaluation=entry["evaluation"],
        scores=_numbers(entry["scores"]),
        answers=answers,
        lengths=lengths,
        gap=None if entry.get("gap") is None else _number("gap", entry["gap"]),
        diagnostics=_numbers(entry.get("diagnostics", {})),
        values={name: [_number(name, x) for x in values] for name, values in entry.get("values", {}).items()},
        intervals=intervals,
    )


def _texts(entries: Any, name: str) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"{name} {entries!r}")
    return entries


def _numbers(entries: Mapping[str, Any]) -> dict[str, float]:
    return {name: _number(name, value) for name, value in entries.items()}


def _number(name: str, value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}")
    return number
