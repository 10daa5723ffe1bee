"""The result of a comparison with sequential DPO, as plain values in one JSON file. Trains and draws nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from tangent_peft.compare.result import read_document
from tangent_peft.compare.scores import Array, pair_scores
from tangent_peft.compare.scoring import HeldOut
from tangent_peft.compare.sequential_settings import EVALUATED, SequentialSettings
from tangent_peft.compare.sources import Scored
from tangent_peft.diagnose.result import plain
from tangent_peft.diagnose.stages.forgetting import Conflict, Forgetting, forgetting
from tangent_peft.diagnose.stages.transfer import ObjectiveScores
from tangent_peft.train.sequential import StageRecord
from tangent_peft.tuner.files import write_text


FORMAT, VERSION = "tangent_peft sequential comparison", 1
JUDGED = ("preference", "accuracy")
KINDS = ("one stage", "sequential", "combined")

Scores: TypeAlias = Mapping[tuple[int, str], tuple[Scored, Scored]]
Records: TypeAlias = Mapping[tuple[int, str, tuple[str, ...]], StageRecord]


@dataclass(frozen=True)
class SequentialResult:
    """Result of `run_sequential`; plain values throughout.

    Attributes:
        settings: of the comparison.
        environment: device and versions.
        systems: one entry for every way of running adapters and every system: its kind (`"one stage"`, `"sequential"`,
            `"combined"`), its name, and by objective the means over pairs and seeds of m, reward accuracy, implied
            preference σ(m), with standard errors over the pairs of the seeds' mean, and each seed's means.
        differences: combined minus sequential, pair by pair, by objective and for the worst objective.
        forgetting: of every sequence: seed, source, order, verdicts, and the diagnosis.
        stages: seconds, parameters and conflicts of the later stages.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    systems: list[dict[str, Any]]
    differences: list[dict[str, Any]]
    forgetting: list[dict[str, Any]]
    stages: list[dict[str, Any]]
    diagnoses: dict[str, Forgetting] = field(default_factory=dict, repr=False, compare=False)

    def save(self, path: str | Path) -> None:
        """Writes the result as JSON, whole or not at all; a number that does not exist becomes `null`."""
        held = {name: plain(value) for name, value in vars(self).items() if name != "diagnoses"}
        text = json.dumps({"format": FORMAT, "version": VERSION, **held}, indent=1, allow_nan=False)
        write_text(Path(path), text + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SequentialResult:
        """Reads what `save` wrote; diagnoses come as plain values, in `forgetting`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is something else, or of another version.
        """
        held = read_document(path, FORMAT, VERSION)
        try:
            return cls(**held)
        except TypeError as error:
            raise ValueError(f"{path} is damaged: {error}. Run the comparison again.") from None


def collect(
    settings: SequentialSettings, environment: dict[str, Any], scored: tuple[HeldOut, Scores], records: Records
) -> SequentialResult:
    """Puts scores and records together.

    Args:
        settings: of the comparison.
        environment: where it ran.
        scored: the held-out pairs, and by seed and source the scores of what was trained apart and of the sequences.
        records: of the later stages.
    """
    data, scores = scored
    systems = _systems(settings, data, scores)
    diagnoses = _diagnoses(settings, data, scores, records)
    return SequentialResult(
        settings.to_dict(),
        environment,
        [_summary(system) for system in systems],
        _differences(settings, systems),
        [
            {"seed": seed, "source": source, "order": list(order), "verdicts": plain(d.verdicts()), **d.to_dict()}
            for (seed, source, order), d in diagnoses.items()
        ],
        [_stage(key, record) for key, record in records.items()],
        {f"seed {seed}, {source}, {' → '.join(order)}": d for (seed, source, order), d in diagnoses.items()},
    )


def _stage(key: tuple[int, str, tuple[str, ...]], record: StageRecord) -> dict[str, Any]:
    seed, method, trained = key
    kept = ("objective", "pairs", "seconds", "trained_parameters")
    found = {name: vars(record)[name] for name in kept}
    return {"seed": seed, "method": method, "trained": list(trained), **found} | {
        "conflicts": [asdict(one) for one in record.conflicts],
        "movement": None if record.movement is None else asdict(record.movement),
    }


# ---- systems ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class System:
    """A model of every seed: by metric and objective the scores of its pairs, (seeds, n)."""

    source: str
    kind: str
    name: str
    scores: dict[str, dict[str, Array]]


def _systems(settings: SequentialSettings, data: HeldOut, scores: Scores) -> list[System]:
    found = []
    for source in settings.sources():
        held = [scores[seed, source] for seed in settings.seeds]
        apart = [_items(settings, data, first) for first, _ in held]
        later = [_items(settings, data, second) for _, second in held]
        for row, mix in enumerate(settings.mixes()):
            alone = len(mix) == 1
            name = next(iter(mix)) if alone else "λ = (" + ", ".join(f"{value:g}" for value in mix.values()) + ")"
            found.append(System(source, KINDS[0] if alone else KINDS[2], name, _rows(apart, row)))
        for row, mix in enumerate(held[0][1].mixes):
            found.append(System(source, KINDS[1], next(iter(mix)), _rows(later, row)))
    return found


def _items(settings: SequentialSettings, data: HeldOut, scored: Scored) -> dict[str, dict[str, Array]]:
    """Scores (M, n) by metric and objective."""
    by_axis = {axis: pair_scores(scored, data, axis, settings.beta) for axis in settings.axes}
    found = {metric: {axis: by_axis[axis][metric] for axis in by_axis} for metric in JUDGED}
    return {**found, "margin": {axis: _margins(settings, data, scored, axis) for axis in settings.axes}}


def _margins(settings: SequentialSettings, data: HeldOut, scored: Scored, axis: str) -> Array:
    gains = (scored.logps.double() - scored.reference.double())[:, data.index[axis]]
    return settings.beta * (gains[..., 0] - gains[..., 1]).numpy() * np.array(data.sign[axis])


def _rows(items: Sequence[dict[str, dict[str, Array]]], row: int) -> dict[str, dict[str, Array]]:
    """One mix of every seed: (seeds, n)."""
    return {m: {axis: np.stack([one[m][axis][row] for one in items]) for axis in items[0][m]} for m in items[0]}


def _summary(system: System) -> dict[str, Any]:
    means = {
        metric: {
            axis: {**_mean_and_error(values.mean(0)), "by_seed": values.mean(1).tolist()}
            for axis, values in held.items()
        }
        for metric, held in system.scores.items()
    }
    return {"source": system.source, "kind": system.kind, "name": system.name, **means}


def _mean_and_error(values: Array) -> dict[str, float]:
    error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
    return {"mean": float(values.mean()), "error": error}


def _differences(settings: SequentialSettings, systems: Sequence[System]) -> list[dict[str, Any]]:
    """Combined minus sequential: of one source with itself, and of linearized axes with a sequential LoRA."""
    complete = {"-".join(order) for order in settings.orders()}
    found = []
    for first in (s for s in systems if s.kind == "combined"):
        for second in (s for s in systems if s.kind == "sequential" and s.name in complete):
            if first.source == second.source or (first.source, second.source) == ("ts_dpo linearized", "lora_soup"):
                labels = {"combined": f"{first.source} {first.name}", "sequential": f"{second.source} {second.name}"}
                found.append({**labels, **{metric: _difference(first, second, metric) for metric in JUDGED}})
    return found


def _difference(first: System, second: System, metric: str) -> dict[str, Any]:
    """By objective, paired; and of the worst objective's mean, without an error, since pairs are not paired there."""
    a, b = first.scores[metric], second.scores[metric]
    worst = min(x.mean() for x in a.values()) - min(x.mean() for x in b.values())
    return {**{axis: _mean_and_error((a[axis] - b[axis]).mean(0)) for axis in a}, "worst": float(worst)}


# ---- forgetting ------------------------------------------------------------------------------------------------------


def _diagnoses(
    settings: SequentialSettings, data: HeldOut, scores: Scores, records: Records
) -> dict[tuple[int, str, tuple[str, ...]], Forgetting]:
    found = {}
    for (seed, source), (apart, later) in scores.items():
        for order in settings.orders():
            prefixes = [tuple(order[:position]) for position in range(1, len(order) + 1)]
            first = apart.logps[settings.mixes().index({order[0]: 1.0})]
            rest = [later.logps[later.mixes.index({"-".join(prefix): 1.0})] for prefix in prefixes[1:]]
            objectives = {
                axis: ObjectiveScores(
                    _chosen_first(apart.reference, data, axis),
                    [_chosen_first(logps, data, axis) for logps in (first, *rest)],
                    _chosen_first(apart.lengths, data, axis),
                )
                for axis in settings.axes
            }
            stages = [records[seed, EVALUATED[source], prefix] for prefix in prefixes[1:]]
            conflicts = [
                Conflict(
                    stage.objective,
                    previous,
                    [one.cosine for one in stage.conflicts if one.previous == previous],
                    [one.agreement for one in stage.conflicts if one.previous == previous],
                )
                for stage in stages
                for previous in stage.previous
            ]
            movements = {stage.objective: stage.movement for stage in stages if stage.movement is not None}
            found[seed, source, tuple(order)] = forgetting(objectives, order, settings.beta, conflicts, movements)
    return found


def _chosen_first(values: torch.Tensor, data: HeldOut, axis: str) -> torch.Tensor:
    """The rows of an objective's pairs of values (N, 2), its chosen answer first."""
    rows = values[data.index[axis]]
    swapped = torch.tensor(data.sign[axis]) < 0
    return torch.where(swapped[:, None], rows.flip(1), rows)
