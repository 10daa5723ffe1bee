"""Reads what sequential training was found to forget, as `tangent-peft sequential` and `Forgetting.save` write it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

from tangent_peft.compare.sequential_result import FORMAT, SequentialResult
from tangent_peft.diagnose.stages.forgetting import Conflict, Forgetting
from tangent_peft.diagnose.stages.transfer import Change, Quartile, Standing
from tangent_peft.tuner.movement import Movement


Row = TypeVar("Row")


def read_stages(file: Path) -> dict[str, Forgetting]:
    """The diagnoses in a file, by what they are of: one for each seed, source and order of a comparison.

    Args:
        file: `result.json` of `tangent-peft sequential`, or a saved `Forgetting`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it holds something else, or no stage that can forget.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no file {file}, named by --sequential.")
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} can not be read as JSON: {error}.") from None
    if isinstance(held, dict) and held.get("format") == FORMAT:
        entries = {_name(entry): entry for entry in SequentialResult.load(file).forgetting}
    else:
        entries = {"": held}
    try:
        found = {name: _restored(entry) for name, entry in entries.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file} is no result of `tangent-peft sequential`, and no saved `Forgetting`: {error!r}."
        ) from None
    if not found:
        raise ValueError(f"{file} holds no sequence of stages, so there is nothing to say of forgetting.")
    return found


def _name(entry: Mapping[str, Any]) -> str:
    return f"{' → '.join(entry['order'])}, {entry['source']}, seed {entry['seed']}"


def _restored(entry: Mapping[str, Any]) -> Forgetting:
    return Forgetting(
        stages=list(entry["stages"]),
        beta=float(entry["beta"]),
        pairs=dict(entry["pairs"]),
        standings=[_row(Standing, row) for row in entry["standings"]],
        changes=[_row(Change, row) for row in entry["changes"]],
        quartiles=[_row(Quartile, row) for row in entry["quartiles"]],
        conflicts=[_row(Conflict, row) for row in entry["conflicts"]],
        movements={stage: _row(Movement, row) for stage, row in entry["movements"].items()},
        reasons=dict(entry["reasons"]),
    )


def _row(kind: type[Row], held: Mapping[str, Any]) -> Row:
    """One row; a number that JSON has as `null` is NaN again."""
    named: Any = fields(kind)  # type: ignore[arg-type]
    needed = {field.name for field in named if field.default is MISSING and field.default_factory is MISSING}
    strange = set(held) - {field.name for field in named} | needed - set(held)
    if strange:
        raise KeyError(f"{kind.__name__} with other fields: {sorted(strange)}")
    return kind(**{name: _number(value) for name, value in held.items()})


def _number(value: Any) -> Any:
    if isinstance(value, list):
        return [_number(entry) for entry in value]
    return math.nan if value is None else value
