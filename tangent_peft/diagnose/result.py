"""What every diagnosis gives: tables, verdicts, a JSON file and pictures. Knows no model.

A diagnosis is a frozen dataclass of plain numbers, so that what is printed, what is saved and what a program reads are
the same. A number that can not be had is NaN, and a verdict or a field beside it says why; JSON has `null` there.
"""

from __future__ import annotations

import dataclasses
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
from torch import Tensor

from tangent_peft.tuner.files import write_text


Cell: TypeAlias = str | int | float | None
Finding: TypeAlias = Literal["fine", "warning", "unknown"]
MARKS: dict[str, str] = {"fine": "ok", "warning": "warning", "unknown": "unknown"}


@dataclass(frozen=True)
class Table:
    """A table of a diagnosis.

    Attributes:
        title: what it shows.
        columns: their heads, units included.
        rows: cells; `None` and NaN mean that there is no number.
        note: how to read it; may be empty.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""

    def __str__(self) -> str:
        cells = [self.columns, *([as_text(cell) for cell in row] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        numeric = [all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))]
        lines = ["  ".join(_aligned(*cell) for cell in zip(row, widths, numeric, strict=True)) for row in cells]
        return "\n".join([self.title, *(f"  {line.rstrip()}" for line in lines), *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Verdict:
    """One line of judgement.

    Attributes:
        finding: `"fine"`, `"warning"`, or `"unknown"` where the data do not say.
        text: the judgement, with its numbers and, for a warning, what to do.
    """

    finding: Finding
    text: str

    def __str__(self) -> str:
        return f"[{MARKS[self.finding]}] {self.text}"


class Diagnosis(ABC):
    """The result of a diagnosis: prints, saves itself as JSON, and draws itself."""

    title: ClassVar[str]

    @abstractmethod
    def tables(self) -> list[Table]:
        """The numbers, for people."""

    @abstractmethod
    def verdicts(self) -> list[Verdict]:
        """What the numbers say."""

    @abstractmethod
    def plot(self, folder: str | Path) -> list[Path]:
        """Draws the pictures, each as PNG and SVG.

        Args:
            folder: where to save; it is made.

        Returns:
            The PNG files.

        Raises:
            ImportError: if matplotlib is missing.
        """

    def __str__(self) -> str:
        parts = [self.title, "\n".join(map(str, self.verdicts())), *map(str, self.tables())]
        return "\n\n".join(part for part in parts if part)

    def to_dict(self) -> dict[str, Any]:
        """The fields as what JSON can hold; numbers that are not finite become `None`."""
        if not dataclasses.is_dataclass(self):
            raise TypeError(f"{type(self).__name__} is no dataclass, so it has no fields to save.")
        return {field.name: plain(vars(self)[field.name]) for field in dataclasses.fields(self)}

    def save(self, path: str | Path) -> None:
        """Writes title, verdicts and fields as JSON, whole or not at all.

        Raises:
            OSError: if the file can not be written.
        """
        verdicts = [dataclasses.asdict(verdict) for verdict in self.verdicts()]
        document = {"diagnosis": self.title, "verdicts": verdicts, **self.to_dict()}
        write_text(Path(path), json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """A value of nested dataclasses, mappings, sequences, arrays and tensors as what JSON can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(vars(value)[field.name]) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def as_text(cell: Cell) -> str:
    """A cell as it is printed: four significant digits, "–" where there is no number."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)


def _aligned(text: str, width: int, numeric: bool) -> str:
    return text.rjust(width) if numeric else text.ljust(width)
