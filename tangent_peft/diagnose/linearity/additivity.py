"""Whether two axes add up in what the network says: non-additivity R over a grid of (λ₁, λ₂).

The prediction that axes do not interfere is logit additivity (arXiv 2608.09490, on a 7 × 7 grid; there the cosine of
two axes does not predict it). With p₀ the base and every network an ordinary one, at its weights,

    R(λ) = JSD(p_actual(λ), p_add(λ)) / JSD(p_add(λ), p₀)

    p_add ∝ p₀ Π (pᵢ / p₀)^λᵢ,        pᵢ at θ₀ + τᵢ: each axis at λ = 1, extrapolated               the paper's, `ratio`
    p_own ∝ p₀ Π (pᵢ(λᵢ) / p₀),       pᵢ(λᵢ) at θ₀ + λᵢτᵢ: each axis at its own λ                  ours, `interaction`

`ratio` holds two things: that each axis bends as its λ grows, which one axis alone shows as well, and that the two act
on each other. `interaction` holds the second alone: it is 0 wherever one λ is 0, and is the one to judge interference
by. Both are ratios of means over positions. A JSD goes with the square of a deviation, so R = 0.25 is a deviation half
as large as the effect, as a linearity gap of 0.5 is. R is NaN where the prediction is the base, or differs from it by
no more than the rounding of the dtype. Where what was missed may be rounding by half, no verdict blames the axes: that
is judged from how far the networks at λ = ±1/16 of an axis are from lying opposite each other around the base.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tangent_peft.diagnose.linearity.divergence import jensen_shannon
from tangent_peft.diagnose.linearity.mix_logits import Batch, MixLogits, Part
from tangent_peft.diagnose.linearity.profile import PROBE, ROUNDING_SHARE
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.tuner.linearity import GAP_LIMIT


GRID = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
LIMIT = GAP_LIMIT**2  # of R, ours: a deviation as large, against the effect, as the limit of the linearity gap
JUDGED_REACH = 1.0  # |λ| up to which the verdict looks

Rows = list[list[float]]


@dataclass(frozen=True)
class PairAdditivity:
    """Two axes on a grid; matrices have a row for each λ of the first and a column for each of the second.

    Attributes:
        first: name of an axis.
        second: of the other one.
        first_weights: λ of the rows.
        second_weights: λ of the columns.
        ratio: R against axes at λ = 1, extrapolated; NaN where `moved` is at most `floor`.
        interaction: R against axes each at its own λ; NaN where `moved_own` is at most `floor`.
        missed: mean JSD(p_actual, p_add), nats.
        moved: mean JSD(p_add, p₀).
        missed_own: mean JSD(p_actual, p_own).
        moved_own: mean JSD(p_own, p₀).
        floor: a JSD that rounding of the logits alone may give in the dtype of the model.
        rounding: about what the rounding of whole networks adds to `missed_own`, nats.
    """

    first: str
    second: str
    first_weights: list[float]
    second_weights: list[float]
    ratio: Rows
    interaction: Rows
    missed: Rows
    moved: Rows
    missed_own: Rows
    moved_own: Rows
    floor: float
    rounding: float

    def cells(self, values: Rows) -> Iterator[tuple[float, float, float]]:
        """λ₁, λ₂ and value of every cell that has a number."""
        for place, row in zip(self.first_weights, values, strict=True):
            for other, value in zip(self.second_weights, row, strict=True):
                if not math.isnan(value):
                    yield place, other, value


@dataclass(frozen=True)
class Additivity(Diagnosis):
    """Result of `additivity`.

    Attributes:
        pairs: every two axes.
        tokens: number of positions.
        dtype: in which the model computes.
        limit: the R up to which two axes are said to add up.
    """

    title: ClassVar[str] = "Non-additivity of axes, R(λ₁, λ₂)"

    pairs: list[PairAdditivity]
    tokens: int
    dtype: str
    limit: float

    def tables(self) -> list[Table]:
        """Two for each pair: `interaction` and `ratio`."""
        found = []
        for pair in self.pairs:
            head = [f"λ_{pair.first} ↓  λ_{pair.second} →", *(f"{weight:g}" for weight in pair.second_weights)]
            note = (
                f"{self.tokens} positions, {self.dtype}, networks at their weights. –: the additive prediction is the "
                f"base there, to within rounding (mean JSD ≤ {pair.floor:.1e} nats)."
            )
            texts = {"each axis at its own λ (interaction)": pair.interaction, "λ = 1, extrapolated": pair.ratio}
            for text, values in texts.items():
                rows: list[list[Cell]] = [
                    [f"{weight:g}", *row] for weight, row in zip(pair.first_weights, values, strict=True)
                ]
                found.append(Table(f"R of {pair.first} and {pair.second}, p_add of {text}", head, rows, note))
        return found

    def verdicts(self) -> list[Verdict]:
        """For each pair, the largest interaction where both |λ| are at most 1, or the largest there is."""
        return [self._judge(pair) for pair in self.pairs]

    def _judge(self, pair: PairAdditivity) -> Verdict:
        both = [cell for cell in pair.cells(pair.interaction) if cell[0] and cell[1]]
        near = [cell for cell in both if max(abs(cell[0]), abs(cell[1])) <= JUDGED_REACH] or both
        names = f"{pair.first} and {pair.second}"
        if not near:
            return Verdict("unknown", f"{names}: no λ of the grid moves the model by more than rounding: no R.")
        place, other, largest = max(near, key=lambda cell: cell[2])
        reach = max(max(abs(place), abs(other)) for place, other, _ in near)
        whole = max((value for _, _, value in pair.cells(pair.ratio)), default=math.nan)
        text = (
            f"{names}: R is at most {largest:.2f} for |λ| up to {reach:g} (at {place:g}, {other:g}), with each axis at "
            f"its own λ; against λ = 1 extrapolated, at most {whole:.2f} on the grid. "
        )
        if largest <= self.limit:
            return Verdict("fine", f"{text}As weights they add up (limit {self.limit:g}).")
        missed = pair.missed_own[pair.first_weights.index(place)][pair.second_weights.index(other)]
        if pair.rounding >= ROUNDING_SHARE * missed:
            hint = f"In {self.dtype} half of that or more may be rounding: measure with the base in float32."
            return Verdict("unknown", f"{text}{hint}")
        hint = "As weights they act on each other: look at answers of the mix itself, or mix linearized, which adds up."
        return Verdict("warning", f"{text}{hint}")

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws both ratios of each pair as heat maps into `additivity-FIRST-SECOND.png` and `.svg`."""
        from tangent_peft.diagnose.linearity.plots import plot_additivity

        return plot_additivity(self, Path(folder))


def additivity(
    model: nn.Module,
    batches: Iterable[Batch],
    axes: Sequence[str] | None = None,
    grid: Sequence[float] = GRID,
    limit: float = LIMIT,
    progress: Callable[[], None] | None = None,
) -> Additivity:
    """Measures R(λ₁, λ₂) of every two axes, on ordinary networks at their weights.

    For each part of a batch, one forward of the base, one for each cell of the grid and two for each axis, above the
    frozen trunk, which runs once. Memory does not grow with the number of batches; logits of a part, a few dozen MiB,
    are held for each λ of the grid.

    Args:
        model: a `PeftModel` with at least two tangent axes; the active mix does not count and stays.
        batches: as of `linearity_profile`.
        axes: two or more of them; all by default.
        grid: λ of each axis, any finite numbers.
        limit: the R up to which two axes are said to add up.
        progress: called after each forward.

    Returns:
        R for every pair; it prints, saves itself as JSON and draws itself.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for fewer than two axes, an unknown one, no λ or one that is not finite, disabled or merged
            adapters, batches without tokens, or a limit that is not positive.
    """
    places = sorted({float(place) for place in grid})
    if not places or not all(map(math.isfinite, places)):
        raise ValueError(f"`grid` holds the λ of each axis, finite numbers, at least one; found {list(grid)}.")
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"`limit` is the largest R to accept, a positive number; found {limit!r}.")
    runs = MixLogits(model, axes)
    if len(runs.axes) < 2:
        raise ValueError(f"Additivity is of two axes or more; found {runs.axes}. Load a second one, or name two.")
    pairs = list(combinations(runs.axes, 2))
    sums = torch.zeros(len(pairs), 4, len(places), len(places), dtype=torch.float64)
    noise = dict.fromkeys(runs.axes, 0.0)
    spread, tokens = 0.0, 0
    with runs.ready():
        for part in runs.parts(batches):
            cells = _Cells(part, progress)
            for index, pair in enumerate(pairs):
                _add_pair(cells, pair, places, sums[index])
            for axis in noise:
                noise[axis] += float(cells.rounding(axis))
            spread += float(cells.base.var(-1, correction=0).sum(dtype=torch.float64))
            tokens += len(cells.base)
    floor = torch.finfo(runs.torch_dtype).eps ** 2 * spread / tokens / 8
    found = []
    for index, pair in enumerate(pairs):
        rounding = max(noise[axis] for axis in pair) / tokens
        found.append(_pair(pair, places, sums[index] / tokens, floor, rounding))
    return Additivity(found, tokens, runs.dtype, limit)


class _Cells:
    """The networks of one part, by mix."""

    def __init__(self, part: Part, progress: Callable[[], None] | None) -> None:
        self.part, self.progress = part, progress
        self.base = part.base()

    def at(self, mix: dict[str, float]) -> Tensor:
        """Logits (n, V) of the network at a mix; those of the base where every λ is 0."""
        mix = {axis: place for axis, place in mix.items() if place}
        found = self.part.weights(mix) if mix else self.base
        if self.progress is not None:
            self.progress()
        return found

    def change(self, axis: str, place: float) -> Tensor:
        """What one axis alone changes at λ."""
        return self.at({axis: place}) - self.base

    def rounding(self, axis: str) -> Tensor:
        """About the JSD, summed, of the rounding of the four networks that a cell of `missed_own` compares.

        f(θ₀ + ετ) + f(θ₀ − ετ) − 2f₀ is of second order in ε, and has the variance of six networks' rounding, less what
        networks so close to each other share of it.
        """
        both = self.at({axis: PROBE}) + self.at({axis: -PROBE}) - self.base
        return _summed(both, self.base)


def _add_pair(cells: _Cells, pair: tuple[str, str], places: Sequence[float], sums: Tensor) -> None:
    """Adds the JSDs of one pair on one part to its sums (4, rows, columns): missed, moved, and both of each own λ."""
    first, second = pair
    base = cells.base
    columns = {place: cells.change(second, place) for place in places}
    one = columns[1.0] if 1.0 in columns else cells.change(second, 1.0)
    other_one = cells.change(first, 1.0)
    for row, place in enumerate(places):
        own = cells.change(first, place)
        for column, other in enumerate(places):
            added = base + place * other_one + other * one
            predicted = base + own + columns[other]
            actual = cells.at({first: place, second: other}) if place and other else predicted
            found = [(actual, added), (added, base), (actual, predicted), (predicted, base)]
            sums[:, row, column] += torch.stack([_summed(*both) for both in found]).cpu()


def _summed(first: Tensor, second: Tensor) -> Tensor:
    """The JSDs of all positions added up, a scalar."""
    if first is second:
        return torch.zeros((), dtype=torch.float64, device=first.device)
    return jensen_shannon(first, second).sum()


def _pair(
    names: tuple[str, str], places: Sequence[float], means: Tensor, floor: float, rounding: float
) -> PairAdditivity:
    missed, moved, missed_own, moved_own = (matrix.tolist() for matrix in means)
    return PairAdditivity(
        first=names[0],
        second=names[1],
        first_weights=list(places),
        second_weights=list(places),
        ratio=_ratio(means[0], means[1], floor),
        interaction=_ratio(means[2], means[3], floor),
        missed=missed,
        moved=moved,
        missed_own=missed_own,
        moved_own=moved_own,
        floor=floor,
        rounding=rounding,
    )


def _ratio(missed: Tensor, moved: Tensor, floor: float) -> Rows:
    """Their ratio; NaN where nothing but rounding moved."""
    rows: Rows = torch.where(moved > floor, missed / moved, math.nan).tolist()
    return rows
