"""Writes measured safe ranges of λ into the configs of saved axes. Nothing else of an axis is touched."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_peft.cli.diagnose_subject import Subject
from tangent_peft.cli.saved_axes import CONFIG, axis_config
from tangent_peft.diagnose.linearity.safe_range import SafeRange, check_not_rounding
from tangent_peft.diagnose.report import Section
from tangent_peft.tuner.files import write_text


FIELD = "safe_range"  # of `TangentConfig`


def check_storable(subject: Subject, sections: Sequence[str]) -> None:
    """Whether `--store` can do what it says, before anything is measured.

    Args:
        subject: what is diagnosed.
        sections: the keys of those that will be made.

    Raises:
        OSError: if a config can not be written.
        ValueError: without axes or without the section `linearity`, or for an axis that is not a folder here.
    """
    if not subject.axes or "linearity" not in sections:
        raise ValueError("--store keeps the safe range of axes, which the section `linearity` measures. Leave it out.")
    for axis, place in subject.axes.items():
        if not place.is_dir():
            raise ValueError(
                f"--store writes into the folder of an axis, and {axis!r} is {place} of the Hub. Save it to a folder."
            )
        if not os.access(place / CONFIG, os.W_OK) or not os.access(place, os.W_OK):
            raise PermissionError(f"{place / CONFIG} can not be written to, which --store asks for.")


def store_ranges(subject: Subject, sections: Sequence[Section]) -> list[str]:
    """Stores the safe range of every axis that was measured.

    Args:
        subject: the axes.
        sections: as they were made.

    Returns:
        A line for each axis whose range is not stored, with the reason.
    """
    results = [part.result for section in sections for part in section.parts]
    found = {result.axis: result for result in results if isinstance(result, SafeRange)}
    failed = []
    for axis, place in subject.axes.items():
        measured = found.get(axis)
        if measured is None:
            failed.append(f"No safe range of {axis} is stored: it could not be measured")
        elif not measured.norm:
            failed.append(f"No safe range of {axis} is stored: τ is 0, so it is not trained yet")
        else:
            try:
                check_not_rounding(measured)
                store_range(place, measured.stored.to_dict())
            except (OSError, ValueError) as error:
                failed.append(f"No safe range of {axis} is stored: {error}")
    return failed


def store_range(place: Path, record: Mapping[str, Any]) -> None:
    """Sets the safe range in the `adapter_config.json` of a saved axis, whole or not at all; all else stays.

    Args:
        place: the axis's folder.
        record: the range, as `StoredRange.to_dict` gives it.

    Raises:
        OSError: if it can not be written.
        ValueError: if the config can not be read.
    """
    held = axis_config(place)
    is_sorted = list(held) == sorted(held)  # as PEFT writes them
    write_text(place / CONFIG, json.dumps({**held, FIELD: dict(record)}, indent=2, sort_keys=is_sorted))
