"""`tangent-peft diagnose`: saved axes or a checkpoint in, one report out."""

from __future__ import annotations

import argparse
import math
import os
import platform
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tangent_peft import __version__
from tangent_peft.cli.diagnose_data import Data, read_data
from tangent_peft.cli.diagnose_sections import SECTIONS, How, Inputs, Kind
from tangent_peft.cli.diagnose_stages import read_stages
from tangent_peft.cli.diagnose_store import check_storable, store_ranges
from tangent_peft.cli.diagnose_subject import Loaded, Subject, find_subject, load_subject
from tangent_peft.cli.memory import peak_memory_gb
from tangent_peft.cli.saved_axes import is_smollm2
from tangent_peft.diagnose.report import RECORD, Circumstances, Part, Report, Section, write_report
from tangent_peft.diagnose.stages.forgetting import Forgetting
from tangent_peft.diagnose.steering.section import SteeringDiagnosis
from tangent_peft.evaluate.plots.drawing import color_map
from tangent_peft.tuner.export.atomic import check_place


# What a section may raise about the models and data it was given. Anything else is a mistake in the program.
EXPECTED = (
    ValueError,
    TypeError,
    ArithmeticError,
    ImportError,
    NotImplementedError,
    MemoryError,
    torch.OutOfMemoryError,
    torch.linalg.LinAlgError,
)
PACKAGES = ("torch", "transformers", "peft", "numpy", "scipy", "matplotlib")
INCOMPLETE = 3  # the exit status where something that was asked for is not in the report


def run_diagnose(options: argparse.Namespace) -> int:
    """Finds and loads what is named, makes every section, writes the report and prints its verdicts.

    Args:
        options: of the command.

    Returns:
        0, or 3 where something that was asked for could not be done; the report says what and why.

    Raises:
        ImportError: if a package of the extra `eval` is missing.
        OSError: if something can not be read or written.
        ValueError: for options that make no diagnosis; nothing heavy has been loaded then.
    """
    _check(options)
    subject, data = Subject("", {}), Data([], {}, {})
    if options.paths:
        subject = find_subject(options.paths, options.base)
        data = read_data(subject, options.prompts, options.pairs, options.max_prompts)
    stages = {} if options.sequential is None else read_stages(options.sequential)
    chosen = choose(options.sections, subject, data, stages)
    if options.store:
        check_storable(subject, [kind.key for kind, reason in chosen if not reason])
    how = How(options.limit, tuple(options.weights or ()), options.seed, options.batch_size, options.effort)
    with warnings.catch_warnings(), _bars() as bars:
        warnings.filterwarnings("ignore", "λ = ", UserWarning)  # λ beyond a safe range are looked at on purpose
        loaded = load_subject(subject, options.dtype) if options.paths else None
        sections = make(chosen, Inputs(subject, loaded, data, how, stages), bars)
    title = options.title or _title(subject, options.sequential)
    report = Report(title, sections, _settings(options, subject, data, loaded), circumstances())
    record = write_report(report, options.report, options.overwrite)
    failed = [*report.undone, *_not_drawn(record)]
    failed += store_ranges(subject, sections) if options.store else []
    _show(report, failed, options.report)
    return INCOMPLETE if failed else 0


def _check(options: argparse.Namespace) -> None:
    """Mistakes that can be seen without reading anything."""
    if not options.paths and options.sequential is None:
        raise ValueError(
            "There is nothing to diagnose. Give folders of saved axes, a checkpoint, or --sequential FILE."
        )
    if not (math.isfinite(options.limit) and options.limit > 0):
        raise ValueError(f"--limit is a positive number, such as 0.5; found {options.limit}.")
    strange = [weight for weight in options.weights or () if not math.isfinite(weight)]
    if strange:
        raise ValueError(f"--weights holds {strange[0]}; λ must be finite numbers.")
    if options.report.is_dir() and any(options.report.iterdir()) and not options.overwrite:
        raise FileExistsError(f"{options.report} exists and is not empty. Name another folder, or pass --overwrite.")
    check_place(options.report, options.overwrite, RECORD)
    date()
    color_map()  # matplotlib is needed at the very end


# ---- sections --------------------------------------------------------------------------------------------------------


def choose(names: str | None, subject: Subject, data: Data, stages: Mapping[str, Forgetting]) -> list[tuple[Kind, str]]:
    """Which sections to make, each with a reason if it does not apply.

    Args:
        names: of the sections, with commas between them; `None`: all.
        subject: what is diagnosed.
        data: what it is measured on.
        stages: what sequential trainings were found to forget.

    Raises:
        ValueError: for an unknown section, or one that was named and does not apply.
    """
    asked = list(dict.fromkeys(word.strip() for word in names.split(",") if word.strip())) if names else list(SECTIONS)
    unknown = sorted(set(asked) - set(SECTIONS))
    if unknown or not asked:
        raise ValueError(f"--sections names {unknown}; the sections are {', '.join(SECTIONS)}.")
    found = [(kind, kind.missing(subject, data, stages)) for key, kind in SECTIONS.items() if key in asked]
    lacking = [f"{kind.key} {reason}" for kind, reason in found if reason]
    if names and lacking:
        raise ValueError(f"--sections can not be made of what is given: {'; '.join(lacking)}.")
    if len(lacking) == len(found):
        raise ValueError(f"No section can be made of what is given: {'; '.join(lacking)}.")
    return found


def make(chosen: Sequence[tuple[Kind, str]], inputs: Inputs, bars: Progress) -> tuple[Section, ...]:
    """Makes the sections one after the other; what can not be done is in them with its reason."""
    task = bars.add_task("", total=sum(len(kind.tasks(inputs)) for kind, reason in chosen if not reason))
    sections = []
    for kind, reason in chosen:
        section = Section(kind.key, kind.title, kind.about, reason=reason and reason[0].upper() + reason[1:] + ".")
        if not reason:
            parts = []
            for name, work in kind.tasks(inputs):
                what = f"{kind.title} {name}".strip()
                bars.update(task, description=what)
                parts.append(_part(name, work))
                bars.advance(task)
                bars.console.print(f"{what}: {parts[-1].seconds:.1f} s", markup=False, highlight=False)
            section = replace(section, parts=tuple(parts))
        sections.append(section)
    return tuple(sections)


def _bars() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=Console(stderr=True))


def _part(name: str, work: Callable[[], Any]) -> Part:
    begun = time.perf_counter()
    try:
        result = work()
    except EXPECTED as error:
        return Part(name, reason=" ".join(str(error).split()), seconds=time.perf_counter() - begun)
    attach = result.save_vectors if isinstance(result, SteeringDiagnosis) else None
    return Part(name, result, seconds=time.perf_counter() - begun, attach=attach)


# ---- what stands around them -----------------------------------------------------------------------------------------


def circumstances() -> Circumstances:
    """Date, command line, versions and memory of this process.

    Raises:
        ValueError: as `date`.
    """
    versions = {"tangent-peft": __version__, **{name: version(name) for name in PACKAGES}}
    versions["python"] = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    versions["threads"] = str(torch.get_num_threads())
    command = shlex.join(["tangent-peft", *sys.argv[1:]])
    return Circumstances(date(), command, versions, peak_memory_gb())


def date() -> str:
    """The present one, or that of `SOURCE_DATE_EPOCH`, which sets it in other programs, too, that are to be repeatable.

    Raises:
        ValueError: if this variable of the environment is no number of seconds since 1970.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        now = datetime.now(UTC) if given is None else datetime.fromtimestamp(int(given), UTC)
    except (ValueError, OverflowError, OSError):
        raise ValueError(f"SOURCE_DATE_EPOCH is {given!r}; it is a number of seconds since 1970.") from None
    return now.strftime("%Y-%m-%d %H:%M UTC")


def _settings(options: argparse.Namespace, subject: Subject, data: Data, loaded: Loaded | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if options.paths:
        found["base"] = subject.base
    found |= {f"axis {axis}": str(place) for axis, place in subject.axes.items()}
    if subject.tuned:
        found["LoRA" if subject.is_lora else "checkpoint"] = subject.tuned
    if options.sequential is not None:
        found["sequential"] = str(options.sequential)
    if options.paths:
        found["prompts"] = f"{len(data.prompts)} ({data.sources['prompts']})"
        counts = ", ".join(f"{name} {len(pairs)}" for name, pairs in data.pairs.items())
        found["pairs"] = f"{counts} ({data.sources['pairs']})" if counts else "none"
    found |= {"limit of the gap": options.limit, "seed": options.seed, "effort": options.effort}
    found["rows per forward"] = options.batch_size
    return found | (dict(loaded.notes) if loaded is not None else {})


def _title(subject: Subject, sequential: Path | None) -> str:
    base = "SmolLM2-135M-Instruct" if is_smollm2(subject.base) else Path(subject.base).name
    if subject.axes:
        return f"Diagnosis of {', '.join(subject.axes)} on {base}"
    return f"Diagnosis of {subject.tuned_name} beside {base}" if subject.tuned else f"Diagnosis of {sequential}"


def _not_drawn(record: Mapping[str, Any]) -> list[str]:
    return [
        f"A figure of {section['title']}: {reason}"
        for section in record["sections"]
        for part in section["parts"]
        for reason in part["not_drawn"]
    ]


def _show(report: Report, failed: Sequence[str], folder: Path) -> None:
    """The verdicts on standard output, warnings first."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for section, index, verdict in report.verdicts():
        name = section.parts[index].name
        console.print(f"{verdict} ({section.key}{', ' + name if name else ''})")
    for line in failed:
        console.print(f"[not done] {line}")
    console.print(f"{folder / 'report.html'} has the whole report, {folder / RECORD} its numbers")
