"""One report of many diagnoses: `report.html`, which needs no other file, `report.json` with every number, and figures.

A `Report` is plain data, and the same report gives the same bytes. Knows no model.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from tangent_peft.diagnose.result import Diagnosis, Table, Verdict, as_text, plain
from tangent_peft.tuner.export.atomic import files_in, fresh_folder


PAGE, RECORD, FIGURES, ATTACHED = "report.html", "report.json", "figures", "attached"
FORMAT = "tangent_peft.diagnosis"
MARKS = {"warning": "▲", "unknown": "?", "fine": "✓"}  # with the word beside it, so that color is not needed
UNDRAWN = (ValueError, TypeError, ArithmeticError)


@dataclass(frozen=True)
class Part:
    """One diagnosis of a section.

    Attributes:
        name: what it is of, such as "help at λ = 1"; empty where a section has one part.
        result: the diagnosis; `None` if it could not be made.
        reason: why it could not be made.
        seconds: that it took.
        attach: writes what belongs to the result and is no number, such as vectors, into the folder it is given.
    """

    name: str
    result: Diagnosis | None = None
    reason: str = ""
    seconds: float = 0.0
    attach: Callable[[Path], object] | None = None


@dataclass(frozen=True)
class Section:
    """One question of a report.

    Attributes:
        key: short name, of letters.
        title: its heading.
        about: what it asks, in a sentence or two.
        parts: its diagnoses.
        reason: why it has none.
        failed: whether it was asked for and not done. A section that does not apply has not failed.
    """

    key: str
    title: str
    about: str = ""
    parts: tuple[Part, ...] = ()
    reason: str = ""
    failed: bool = False

    @property
    def undone(self) -> list[str]:
        """A line for everything that was asked for and is not here, with the reason."""
        lines = [f"{self.title}: {self.reason}"] if self.failed else []
        return lines + [f"{_joined(self.title, part.name)}: {part.reason}" for part in self.parts if not part.result]

    @property
    def seconds(self) -> float:
        """Wall time of all parts."""
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True)
class Circumstances:
    """What may differ between two runs of the same diagnosis.

    Attributes:
        date: of the run, as it is to be printed.
        command: the command line.
        versions: of packages and the platform, by name.
        peak_memory_gb: largest resident size of the process, in GiB; NaN if it is not known.
    """

    date: str
    command: str
    versions: Mapping[str, str] = field(default_factory=dict)
    peak_memory_gb: float = math.nan


@dataclass(frozen=True)
class Report:
    """Everything a report says.

    Attributes:
        title: its heading.
        sections: in order.
        settings: what was diagnosed and how, by name: models, data, seeds; plain values.
        run: what may differ between two runs.
    """

    title: str
    sections: tuple[Section, ...]
    settings: Mapping[str, Any]
    run: Circumstances

    def verdicts(self) -> list[tuple[Section, int, Verdict]]:
        """All verdicts, warnings first and what is unknown next, with their sections and the indices of their parts."""
        found = [
            (section, index, verdict)
            for section in self.sections
            for index, part in enumerate(section.parts)
            if part.result is not None
            for verdict in part.result.verdicts()
        ]
        order = list(MARKS)
        return sorted(found, key=lambda entry: order.index(entry[2].finding))

    @property
    def undone(self) -> list[str]:
        """A line for everything that was asked for and is not here, with the reason."""
        return [line for section in self.sections for line in section.undone]

    def to_dict(self, figures: Mapping[tuple[str, int], list[Figure]] | None = None) -> dict[str, Any]:
        """The report for programs: every result whole, NaN as `None`.

        Args:
            figures: as `draw` returns them; their paths are listed.
        """
        drawn = {} if figures is None else figures
        return {
            "format": FORMAT,
            "version": 1,
            "title": self.title,
            "settings": plain(self.settings),
            "verdicts": [
                {"section": section.key, "part": section.parts[index].name, **vars(verdict)}
                for section, index, verdict in self.verdicts()
            ],
            "not_done": self.undone,
            "sections": [_section(section, drawn) for section in self.sections],
            "run": {
                "date": self.run.date,
                "command": self.run.command,
                "versions": dict(self.run.versions),
                "peak_memory_gb": plain(round(self.run.peak_memory_gb, 3)),
                "seconds": {section.key: round(section.seconds, 2) for section in self.sections if section.parts},
            },
        }


@dataclass(frozen=True)
class Figure:
    """A drawn figure.

    Attributes:
        files: as PNG and as SVG, relative to the report's folder, with slashes.
        text: what it shows, for who can not see it.
        uri: the smaller of the two files as a data URI; empty if it could not be drawn.
        reason: why it could not be drawn.
    """

    files: tuple[str, ...]
    text: str
    uri: str = ""
    reason: str = ""


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_report(report: Report, folder: str | Path, overwrite: bool = False) -> dict[str, Any]:
    """Writes page, JSON, figures and what parts attach into a folder that appears whole or not at all.

    Args:
        report: to write.
        folder: to make; it must not exist yet, or be empty.
        overwrite: replace an earlier report there; a folder that holds anything else is never replaced.

    Returns:
        What `report.json` holds.

    Raises:
        FileExistsError: if something else is at that place.
        ImportError: if matplotlib or jinja2 is missing.
        OSError: if a file can not be written.
        ValueError: for a place that can not be a folder of its own, such as the working directory.
    """
    with fresh_folder(Path(folder), overwrite, RECORD) as unfinished:
        figures = draw(report, unfinished)
        for section, index, part in _parts(report):
            if part.attach is not None:
                part.attach(_place(unfinished / ATTACHED, section, index))
        (unfinished / PAGE).write_text(page(report, figures), encoding="utf-8")
        record = {**report.to_dict(figures), "files": sorted(files_in(unfinished))}
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        (unfinished / RECORD).write_text(text + "\n", encoding="utf-8")
    return record


def draw(report: Report, folder: Path) -> dict[tuple[str, int], list[Figure]]:
    """Draws all figures below `folder`.

    Returns:
        The figures by section and index of the part. One that can not be drawn has no files, but a reason.
    """
    found: dict[tuple[str, int], list[Figure]] = {}
    for section, index, part in _parts(report):
        if part.result is not None:
            place = _place(folder / FIGURES, section, index)
            found[section.key, index] = _figures(part.result, _joined(section.title, part.name), place, folder)
    return found


def _parts(report: Report) -> Iterator[tuple[Section, int, Part]]:
    for section in report.sections:
        for index, part in enumerate(section.parts):
            yield section, index, part


def _place(folder: Path, section: Section, index: int) -> Path:
    """A folder of its own for each part."""
    slugs = [_slug(part.name) for part in section.parts]
    slug = slugs[index] if slugs.count(slugs[index]) == 1 else f"{slugs[index]}-{index}"
    return folder / "-".join(filter(None, [section.key, slug]))


def _figures(result: Diagnosis, title: str, place: Path, folder: Path) -> list[Figure]:
    try:
        drawn = result.plot(place)
    except UNDRAWN as error:
        return [Figure((), title, reason=f"{type(error).__name__}: {error}")]
    figures = []
    for png in drawn:
        files = [file for file in (png, png.with_suffix(".svg")) if file.is_file()]
        text = f"{title}: {png.stem.replace('_', ' ').replace('-', ' ')}"
        names = tuple(file.relative_to(folder).as_posix() for file in files)
        figures.append(Figure(names, text, _uri(min(files, key=lambda file: file.stat().st_size))))
    return figures


def _uri(file: Path) -> str:
    kind = "image/svg+xml" if file.suffix == ".svg" else "image/png"
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40]


def _joined(title: str, name: str) -> str:
    return f"{title}, {name}" if name else title


# ---- for programs ----------------------------------------------------------------------------------------------------


def _section(section: Section, drawn: Mapping[tuple[str, int], list[Figure]]) -> dict[str, Any]:
    parts = [
        {
            "name": part.name,
            "seconds": round(part.seconds, 2),
            "reason": part.reason,
            "result": None if part.result is None else part.result.to_dict(),
            "figures": [name for figure in drawn.get((section.key, index), []) for name in figure.files],
            "not_drawn": [figure.reason for figure in drawn.get((section.key, index), []) if figure.reason],
        }
        for index, part in enumerate(section.parts)
    ]
    return {
        "key": section.key,
        "title": section.title,
        "failed": section.failed,
        "reason": section.reason,
        "parts": parts,
    }


# ---- for people ------------------------------------------------------------------------------------------------------


def page(report: Report, figures: Mapping[tuple[str, int], list[Figure]]) -> str:
    """The report as one HTML document, which loads nothing from elsewhere; every text in it is escaped.

    Args:
        report: to show.
        figures: as `draw` returns them.

    Raises:
        ImportError: if jinja2 is missing.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise ImportError("A report needs jinja2, which comes with torch: pip install jinja2") from error
    source = resources.files("tangent_peft").joinpath("diagnose", PAGE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"cell": as_text, "numeric": numeric, "setting": setting, "duration": duration}
    verdicts = report.verdicts()
    counts = {finding: sum(v.finding == finding for *_, v in verdicts) for finding in MARKS}
    return environment.from_string(source).render(
        report=report, figures=figures, verdicts=verdicts, counts=counts, marks=MARKS, settings=list(_settings(report))
    )


def numeric(table: Table) -> list[bool]:
    """For each column whether it holds numbers, which are set flush right."""
    return [all(not isinstance(row[index], str) for row in table.rows) for index in range(len(table.columns))]


def setting(value: Any) -> str:
    """A setting as text."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def duration(seconds: float) -> str:
    """A wall time as text."""
    return f"{seconds:.1f} s" if seconds < 60 else f"{int(seconds // 60)} min {seconds % 60:.0f} s"


def _settings(report: Report) -> Iterator[tuple[str, Any]]:
    yield from report.settings.items()
    yield from report.run.versions.items()
