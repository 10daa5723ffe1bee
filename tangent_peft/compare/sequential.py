"""Sequential DPO against the same objectives trained apart and combined afterwards; what is there is not done again.

Objectives trained apart are the trainings of a comparison, and each is the first stage of a sequence. Later stages
train its adapter on. All are scored on the same held-out pairs, in the same ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import PeftConfig

from tangent_peft.compare.run import Report, claim, environment, run_jobs
from tangent_peft.compare.scoring import held_out, pair_key
from tangent_peft.compare.sequential_result import SequentialResult, collect
from tangent_peft.compare.sequential_settings import EVALUATED, SequentialSettings, stage_name
from tangent_peft.compare.sources import Adapters, Scored, score, score_adapters, score_file
from tangent_peft.compare.training import (
    RECORD,
    Row,
    Training,
    load_model,
    read_pairs,
    run_training,
    single_name,
    training_options,
    training_pairs,
    trainings,
)
from tangent_peft.train.sequential import STAGE, Objective, SequentialSetup, StageRecord, run_stage


def run_sequential(settings: SequentialSettings, processes: int = 1, report: Report | None = None) -> SequentialResult:
    """Trains and scores everything that is not there yet, and returns the result.

    Args:
        settings: of the comparison.
        processes: trainings and scores side by side; they share the CPU's cores. One on a GPU.
        report: called after every training and every score.

    Raises:
        FileNotFoundError: if data is missing.
        ValueError: if the folder holds a run of other settings, or pairs are too few to compare gradients on.
    """
    claim(settings)
    for seed in settings.seeds:
        for axis in settings.axes:
            conflict_pairs(settings, seed, axis)  # too few of them are named before hours are spent
    phases = _phases(settings)
    total, done = sum(len(jobs) for jobs, _ in phases), 0
    for jobs, is_done in phases:
        missing = [job for job in jobs if not is_done(job)]
        done += len(jobs) - len(missing)
        for name in run_jobs(missing, processes):
            done += 1
            if report is not None:
                report(name, done, total)
    return collect(settings, environment(), _scores(settings), records(settings))


Job = tuple[str, Callable[..., Any], tuple[Any, ...]]


def _phases(settings: SequentialSettings) -> list[tuple[list[Job], Callable[[Job], bool]]]:
    """Jobs that need nothing of each other, phase by phase, and whether one of them is done."""
    seeds = settings.seeds
    planned = [training for seed in seeds for training in trainings(settings, seed)]
    phases: list[tuple[list[Job], Callable[[Job], bool]]] = []
    apart: list[Job] = [(training.name, run_training, (settings, training)) for training in planned]
    phases.append((apart, lambda job: (job[2][1].folder(settings) / RECORD).is_file()))
    for position in range(2, len(settings.axes) + 1):
        later: list[Job] = [
            (stage_name(method, order[:position]), run_later_stage, (settings, seed, method, order[:position]))
            for seed in seeds
            for method in settings.methods
            for order in settings.orders()
        ]
        phases.append((later, lambda job: (_folder(settings, job[2][1], job[2][2], job[2][3]) / STAGE).is_file()))
    scored: list[Job] = [(source, score, (settings, seed, source)) for seed in seeds for source in settings.sources()]
    scored += [
        (f"sequential {source}", score_sequences, (settings, seed, source))
        for seed in seeds
        for source in settings.sources()
    ]
    return [*phases, (scored, lambda job: False)]


# ---- stages ----------------------------------------------------------------------------------------------------------


def _folder(settings: SequentialSettings, seed: int, method: str, trained: list[str]) -> Path:
    """Where the adapter lies after these objectives in this order."""
    name = single_name(method, trained[0]) if len(trained) == 1 else stage_name(method, trained)
    return Path(settings.output) / f"seed-{seed}" / name


def run_later_stage(settings: SequentialSettings, seed: int, method: str, trained: list[str]) -> StageRecord:
    """Trains the adapter of a sequence on, on the last of some objectives."""
    start = _folder(settings, seed, method, trained[:-1])
    options = {
        **training_options(settings, method, seed),
        "conflict_steps": settings.conflict_steps,
        "conflict_batch_size": settings.conflict_pairs,
        "project_conflicts": settings.project_conflicts,
    }
    setup = SequentialSetup(functools.partial(load_model, settings), PeftConfig.from_pretrained(str(start)), options)
    objectives = [
        Objective(
            axis,
            Dataset.from_list(training_pairs(settings, Training(method, single_name(method, axis), {axis: 1.0}, seed))),
            Dataset.from_list(conflict_pairs(settings, seed, axis)),
        )
        for axis in trained
    ]
    return run_stage(setup, objectives, _folder(settings, seed, method, trained), start)


def conflict_pairs(settings: SequentialSettings, seed: int, axis: str) -> list[Row]:
    """Pairs of an axis that no axis is trained or scored on, for its gradient in later stages.

    Axes may have pairs in common, the other way around even, and a step's gradient would then be compared with itself.

    Raises:
        ValueError: if there are fewer than `conflict_pairs`.
    """
    used = set()
    for one in settings.axes:
        drawn = training_pairs(settings, Training("ts_dpo", single_name("ts_dpo", one), {one: 1.0}, seed))
        used |= {pair_key(row) for row in [*drawn, *read_pairs(settings.test_set(one))[: settings.heldout]]}
    rows = [*read_pairs(settings.test_set(axis))[settings.heldout :], *read_pairs(settings.training_set(axis))]
    found = [row for row in rows if pair_key(row) not in used]
    if len(found) < settings.conflict_pairs:
        raise ValueError(
            f"Axis {axis!r} has {len(found)} pairs that no axis is trained or scored on, fewer than "
            f"`conflict_pairs={settings.conflict_pairs}`, on which its gradient is measured. Lower `conflict_pairs` or "
            "`heldout`, or give more pairs."
        )
    return found


def records(settings: SequentialSettings) -> dict[tuple[int, str, tuple[str, ...]], StageRecord]:
    """The records of all later stages, by seed, method and the objectives trained by then."""
    return {
        (seed, method, tuple(order[:position])): StageRecord.read(_folder(settings, seed, method, order[:position]))
        for seed in settings.seeds
        for method in settings.methods
        for order in settings.orders()
        for position in range(2, len(order) + 1)
    }


# ---- scores ----------------------------------------------------------------------------------------------------------


def score_sequences(settings: SequentialSettings, seed: int, source: str) -> Scored:
    """Scores what later stages left, each adapter alone; a mix is named by the objectives, `{"help-verb": 1.0}`."""
    method = EVALUATED[source]
    names = {
        "-".join(order[:position]): stage_name(method, order[:position])
        for order in settings.orders()
        for position in range(2, len(order) + 1)
    }
    adapters = Adapters(settings, seed, names, [{name: 1.0} for name in names])
    return score_adapters(adapters, source, score_file(settings, seed, f"sequential {source}"))


def _scores(settings: SequentialSettings) -> Any:
    data = held_out(settings)
    found = {
        (seed, source): (score(settings, seed, source), score_sequences(settings, seed, source))
        for seed in settings.seeds
        for source in settings.sources()
    }
    return data, found
