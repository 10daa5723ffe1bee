"""A report of made-up diagnoses, for the tests of reports."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from tangent_peft.diagnose.report import Circumstances, Part, Report, Section
from tangent_peft.diagnose.result import Diagnosis, Table, Verdict
from tangent_peft.evaluate.plots.drawing import drawing


HOSTILE = """<script>alert("1")</script> & 'x' {{ 7 * 7 }}"""


@dataclass(frozen=True)
class Stub(Diagnosis):
    """A diagnosis with known tables, verdicts and pictures."""

    title: ClassVar[str] = "Stub"
    numbers: list[float]
    findings: list[tuple[str, str]]
    note: str = ""
    pictures: list[str] = field(default_factory=list)

    def tables(self) -> list[Table]:
        rows = [[f"row {index}", value, index, None] for index, value in enumerate(self.numbers)]
        return [Table(f"Numbers of {len(rows)}", ["name", "value", "count", "none"], rows, self.note)]

    def verdicts(self) -> list[Verdict]:
        return [Verdict(finding, text) for finding, text in self.findings]  # type: ignore[arg-type]

    def plot(self, folder: str | Path) -> list[Path]:
        paths = [Path(folder) / f"{name}.png" for name in self.pictures]
        for path in paths:
            with drawing(path, (2, 1)) as figure:
                figure.subplots().plot(self.numbers)
        return paths


@dataclass(frozen=True)
class Undrawable(Stub):
    """A diagnosis whose picture fails."""

    def plot(self, folder: str | Path) -> list[Path]:
        raise ValueError("nothing but NaN")


def report(**changes: Any) -> Report:
    first = Stub(
        [0.123456, math.nan, -2.5], [("fine", "All is well."), ("warning", "But not here.")], "A note.", ["a_b"]
    )
    second = Stub([1.0], [("unknown", f"Who knows {HOSTILE}.")])
    sections = (
        Section("one", "First", "What it asks.", (Part("", first, seconds=1.25),)),
        Section("two", "Second", "", (Part(f"help {HOSTILE}", second), Part("verb", reason="too few prompts: 3"))),
        Section("three", "Third", reason="needs tangent axes"),
        Section("four", "Fourth", reason="no pairs", failed=True),
    )
    run = Circumstances("1 January 2030", f"tangent-peft diagnose {HOSTILE}", {"torch": "9.9"}, 1.5)
    given: dict[str, Any] = {"title": "A report", "sections": sections, "settings": {"seed": 7, "axes": ["help"]}}
    return Report(**{**given, "run": run, **changes})
