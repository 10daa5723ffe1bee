"""What `steering_effect` measures: for each λ what v⋆ does, what random directions of its norm do, the difference."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np

from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.evaluate.plots.drawing import INK, PALE, drawing, looks, pictures


Mode: TypeAlias = Literal["interpolation", "inversion"]
MODES: tuple[Mode, ...] = ("interpolation", "inversion")
TARGET = {"interpolation": "tuned", "inversion": "base"}  # whom a steered model is to become
FEW = 8  # pairs; with fewer nothing is judged


@dataclass(frozen=True)
class SteeringPoint:
    """One λ of one sweep; numbers by metric.

    Attributes:
        mode: `"interpolation"`, base + λ v⋆, or `"inversion"`, tuned − λ v⋆.
        strength: λ.
        values: with v⋆.
        controls: with random directions of the same norm at each layer, one number per seed.
        control_means: mean over them.
        control_sds: standard deviation over them.
    """

    mode: Mode
    strength: float
    values: dict[str, float]
    controls: dict[str, list[float]]
    control_means: dict[str, float]
    control_sds: dict[str, float]

    @property
    def is_chance(self) -> bool:
        """Whether random directions come as close to the target: their lowest KL, and 2 sd below their mean of log KL.

        Logarithms, because some random directions go far astray and none gets far below the start.
        """
        metric = f"kl_{TARGET[self.mode]}"
        mine, others = self.values[metric], self.controls[metric]
        if not 0 < mine < min(others):
            return mine != 0
        logs = [math.log(other) for other in others]
        return math.log(mine) > statistics.fmean(logs) - 2 * statistics.stdev(logs)

    def excess(self, metric: str) -> float:
        """Effect minus control: what v⋆ changes beyond what random directions do."""
        return self.values[metric] - self.control_means[metric]


@dataclass(frozen=True)
class TokenRecovery:
    """How much of the distance to the other model steering has closed: 1 all of it, 0 none, negative: it grew.

    Attributes:
        kl: 1 − KL(steered ‖ target) / KL(start ‖ target); NaN if there was no distance.
        control_mean: mean of the same with random directions.
        control_sd: its standard deviation.
        match: (agreement with the target − that of the start) / (1 − that of the start), on the most likely token.
        match_control: the same with random directions.
    """

    kl: float
    control_mean: float
    control_sd: float
    match: float
    match_control: float


@dataclass(frozen=True)
class SteeringEffect(Diagnosis):
    """Result of `steering_effect`.

    Attributes:
        base: name of the state before.
        tuned: name of the state after.
        pairs: number of held-out pairs.
        layers: which layers were steered.
        metrics: what was measured, and what tables call it.
        unsteered: values at λ = 0, by mode: of the base and of the tuned model.
        points: one for each mode and λ.
        settings: model, dtype, vectors, controls, seeds, sizes.
    """

    title: ClassVar[str] = "D-STEER: what the vector does"

    base: str
    tuned: str
    pairs: int
    layers: list[int]
    metrics: dict[str, str]
    unsteered: dict[str, dict[str, float]]
    points: list[SteeringPoint]
    settings: dict[str, Any]

    def recovery(self, point: SteeringPoint) -> TokenRecovery:
        """How far a point has come to its target: for inversion the behavioral form of inversion recovery."""
        target, start = TARGET[point.mode], self.unsteered[point.mode]
        far, same = start[f"kl_{target}"], start[f"match_{target}"]
        values = [
            _closed(point.values[f"kl_{target}"], far),
            _closed(point.control_means[f"kl_{target}"], far),
            point.control_sds[f"kl_{target}"] / far if far else math.nan,
            _closed(1 - point.values[f"match_{target}"], 1 - same),
            _closed(1 - point.control_means[f"match_{target}"], 1 - same),
        ]
        return TokenRecovery(*values)

    def at(self, mode: Mode, strength: float) -> SteeringPoint | None:
        """The point of a mode at λ, or `None`."""
        return next((p for p in self.points if p.mode == mode and p.strength == strength), None)

    # ---- tables ----------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """Metrics by λ for each mode, with the control's beside, and how much of the distance is closed."""
        return [*(self._sweep_table(mode) for mode in MODES), self._recovery_table()]

    def _sweep_table(self, mode: Mode) -> Table:
        sum_ = f"{self.base} + λ v⋆" if mode == "interpolation" else f"{self.tuned} − λ v⋆"
        rows: list[list[Cell]] = [[0.0, "unsteered", *(self.unsteered[mode][name] for name in self.metrics)]]
        for point in self.points:
            if point.mode != mode:
                continue
            lines: dict[str, Mapping[str, float]] = {
                "v⋆": point.values,
                "random, mean": point.control_means,
                "random, sd": point.control_sds,
                "v⋆ − random": {name: point.excess(name) for name in self.metrics},
            }
            rows += [[point.strength, kind, *(line[name] for name in self.metrics)] for kind, line in lines.items()]
        read = self.settings["answer_tokens"]
        part = "all" if read is None else f"the first {read}"
        note = (
            f"{self.pairs} held-out pairs, {part} tokens of each answer; layers {self.layers}; "
            f"{self.settings['control_seeds']} random directions of the same norm. KL in nats per token, of the "
            "steered model from the other. Margin and reward accuracy are relative to the base."
        )
        return Table(f"{mode.capitalize()}: {sum_}", ["λ", "direction", *self.metrics.values()], rows, note)

    def _recovery_table(self) -> Table:
        columns = ["sweep", "λ", "KL closed", "random", "±", "top-1 closed", "random"]
        rows: list[list[Cell]] = []
        for point in self.points:
            found = self.recovery(point)
            row = [found.kl, found.control_mean, found.control_sd, found.match, found.match_control]
            rows.append([point.mode, point.strength, *row])
        note = "Share of the distance to the other model that is closed: 1 all, 0 none, negative: it grew."
        return Table("How far steering gets", columns, rows, note)

    # ---- verdicts --------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """Inversion and interpolation at λ = 1, each against random directions."""
        if self.pairs < FEW:
            return [Verdict("unknown", f"{self.pairs} pairs are too few to judge steering by; give at least {FEW}.")]
        return [self._verdict(mode) for mode in MODES]

    def _verdict(self, mode: Mode) -> Verdict:
        goal, name = (self.tuned, "Interpolation") if mode == "interpolation" else (self.base, "Inversion")
        point = self.at(mode, 1.0)
        if point is None:
            return Verdict("unknown", f"{name} was not measured at λ = 1.")
        found = self.recovery(point)
        if self.unsteered[mode][f"kl_{TARGET[mode]}"] == 0:
            return Verdict(
                "unknown", f"{name}: {self.base} and {self.tuned} predict the same, so nothing can be closed."
            )
        if not (math.isfinite(found.kl) and math.isfinite(found.control_mean)):
            return Verdict("unknown", f"{name} at λ = 1: a KL is not finite. Load in float32, or steer less.")
        same = f"and {found.match:.0%} of the missing top-1 agreement", f" and {found.match_control:.0%}"
        same = ("(the most likely tokens are the same)", "") if math.isnan(found.match) else same
        text = (
            f"{name} at λ = 1 closes {found.kl:.0%} of the KL to {goal!r} {same[0]}; random directions of the same "
            f"norm {found.control_mean:.0%} ± {found.control_sd:.0%}{same[1]} ({self.pairs} held-out pairs)."
        )
        if point.is_chance:
            return Verdict("warning", f"{text} That is no more than chance: do not read meaning into this vector.")
        if found.kl <= 0:
            return Verdict(
                "warning", f"{text} It leads away, if less than chance does: too long, or of another position."
            )
        if found.kl < 0.5:
            return Verdict(
                "warning", f"{text} More than chance, but less than half: most of the training is elsewhere."
            )
        return Verdict("fine", text)

    # ---- pictures --------------------------------------------------------------------------------------------------

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws what v⋆ and random directions do against λ (`steering_effect`)."""
        path = Path(folder) / "steering_effect"
        shown = ["margin", "kl_base", "kl_tuned", "match_tuned"]
        with drawing(path, (3.0 * len(shown), 5.6)) as figure:
            grid = figure.subplots(len(MODES), len(shown), squeeze=False)
            for row, mode in zip(grid, MODES, strict=True):
                for axes, metric in zip(row, shown, strict=True):
                    self._draw(axes, mode, metric)
                row[0].set_title(f"{mode}: {self.base if mode == 'interpolation' else self.tuned}", loc="left")
            grid[0][0].legend()
        return [pictures(path)[0]]

    def _draw(self, axes: Any, mode: Mode, metric: str) -> None:
        points = sorted((p for p in self.points if p.mode == mode), key=lambda point: point.strength)
        places = sorted([0.0, *(point.strength for point in points)])
        start = self.unsteered[mode][metric]
        kept = {point.strength: point for point in points}
        lines = {
            "v⋆": [kept[x].values[metric] if x else start for x in places],
            "random": [kept[x].control_means[metric] if x else start for x in places],
        }
        spread = np.array([kept[x].control_sds[metric] if x else 0.0 for x in places])
        for (name, line), look in zip(lines.items(), looks(lines).values(), strict=True):
            axes.plot(places, line, color=look.color, linestyle=look.dash, marker=look.marker, markersize=4, label=name)
        middle = np.array(lines["random"])
        axes.fill_between(places, middle - spread, middle + spread, color=PALE, alpha=0.6, linewidth=0)
        axes.axvline(0.0, color=INK, linewidth=0.6, linestyle=":")
        axes.set(xlabel="λ", ylabel=self.metrics[metric])


def _closed(left: float, whole: float) -> float:
    return 1 - left / whole if whole > 0 else math.nan
