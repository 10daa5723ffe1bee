"""The range of λ within which an axis, alone, stays within a limit of the linearity gap; and keeping it with the axis.

On each side of 0 a few λ up to `reach` are measured first. Where the gap crosses the limit between two of them, that
bracket is narrowed until it is no wider than `tolerance`: at λ a little below and above where a power law through its
ends puts the crossing (to first order the gap is proportional to |λ|), and at its middle if that did not halve it. What
is reported is the end that was measured to be within the limit.

The gap of a deep network need not rise all the way. If it fell anywhere between the λ measured, the result says so, and
reports the first crossing seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import ClassVar, Literal, TypeAlias

from torch import nn

from tangent_peft.diagnose.linearity.mix_logits import Batch, MixLogits
from tangent_peft.diagnose.linearity.profile import as_gap, check_limit, measure_sums, positions
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.tuner import axis_norm, tangent_tuner
from tangent_peft.tuner.axes import check_known
from tangent_peft.tuner.linearity import GAP_LIMIT
from tangent_peft.tuner.safe_range import StoredRange, is_of_this_tangent, store_range


Measure: TypeAlias = Literal["logits", "log_probs"]

SCAN = (0.125, 0.25, 0.5, 1.0)  # shares of the reach that are measured first, on both sides
FALL = 0.02  # relative; a gap that falls by more than this as |λ| rises is not monotone
FINEST = 1e-6  # of the reach: no bracket is narrowed further, whatever the tolerance
BESIDE = 0.4  # of the tolerance: how far beside the place where a crossing is expected it is measured


@dataclass(frozen=True)
class GapProbe:
    """A gap that was measured.

    Attributes:
        weight: λ.
        gap: at it; infinite where logits are not finite.
    """

    weight: float
    gap: float


@dataclass(frozen=True)
class SafeRange(Diagnosis):
    """Result of `safe_range`. It is about the network at the weights θ₀ + λτ of this axis alone.

    Attributes:
        axis: its name.
        low: smallest λ that was measured to be within the limit, at most 0, with all measured between it and 0.
        high: largest one, at least 0.
        low_is_bound: whether the limit is crossed within `tolerance` below `low`; if not, `low` is `-reach`.
        high_is_bound: the same above `high`.
        low_is_monotone: whether the gap rose all the way from 0 down.
        high_is_monotone: whether it did from 0 up.
        limit: of the gap.
        measure: what the gap is of, "logits" or "log_probs".
        reach: how far λ was followed.
        tolerance: how exactly a bound is known.
        probes: all that was measured, by λ.
        norm: ‖τ‖ of the axis.
        tokens: number of positions.
        dtype: in which the model computes.
    """

    title: ClassVar[str] = "Safe range of λ"

    axis: str
    low: float
    high: float
    low_is_bound: bool
    high_is_bound: bool
    low_is_monotone: bool
    high_is_monotone: bool
    limit: float
    measure: Measure
    reach: float
    tolerance: float
    probes: list[GapProbe]
    norm: float
    tokens: int
    dtype: str

    @property
    def stored(self) -> StoredRange:
        """What is kept with the axis."""
        bounds = (self.low, self.high, self.low_is_bound, self.high_is_bound)
        return StoredRange(*bounds, limit=self.limit, measure=self.measure, norm=self.norm)

    @property
    def is_rounding(self) -> bool:
        """Whether a bound is one of rounding: in less than float32, with a gap within the limit at a larger |λ|.

        What rounding adds to the gap falls as 1/|λ|; what the axis adds rises.
        """
        if self.dtype in ("float32", "float64"):
            return False
        sides = ((self.low_is_bound, -1.0, -self.low), (self.high_is_bound, 1.0, self.high))
        return any(
            is_bound and any(sign * probe.weight > bound and probe.gap <= self.limit for probe in self.probes)
            for is_bound, sign, bound in sides
        )

    @property
    def text(self) -> str:
        """The range in a line, such as "λ of help from −2.1 to at least 4 (gap ≤ 0.5)"."""
        of = " of log-probs" if self.measure == "log_probs" else ""
        return f"λ of {self.axis} {self.stored} (gap{of} ≤ {self.limit:g})"

    def tables(self) -> list[Table]:
        """The range, and the gaps that were measured for it."""
        rows: list[list[Cell]] = [[probe.weight, probe.gap] for probe in self.probes]
        note = (
            f"{self.tokens} positions, {self.dtype}, gap of {self.measure}, bounds to within {self.tolerance:g}. It is "
            "about the network at the weights θ₀ + λτ of this axis alone; the linearized evaluation is exact in λ."
        )
        return [Table(f"Gaps of {self.axis}", ["λ", "gap"], rows, note)]

    def verdicts(self) -> list[Verdict]:
        """The range; and where the gap did not rise all the way, that it may not hold in between."""
        if self.norm == 0.0 or not any(probe.gap for probe in self.probes):
            return [Verdict("unknown", f"{self.axis} changes no logit on these tokens; any λ is within the limit.")]
        held = Verdict("fine" if self.low <= -1.0 and self.high >= 1.0 else "warning", self.text)
        sides = {"below 0": self.low_is_monotone, "above 0": self.high_is_monotone}
        falling = [side for side, monotone in sides.items() if not monotone]
        if not falling:
            return [held]
        text = (
            f"{self.axis}: {' and '.join(falling)} the gap does not rise all the way with |λ|. The bound is the first "
            "crossing seen; between the λ measured there may be others."
        )
        if self.dtype not in ("float32", "float64"):
            text += f" In {self.dtype} that is likely rounding: measure with the base in float32."
        return [Verdict("unknown", text)] if self.is_rounding else [held, Verdict("unknown", text)]

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws the gaps measured, the limit and the range into `safe-range-AXIS.png` and `.svg`."""
        from tangent_peft.diagnose.linearity.plots import file_name, plot_range

        return [plot_range(self, Path(folder) / f"safe-range-{file_name(self.axis)}.png")]


def safe_range(
    model: nn.Module,
    batches: Sequence[Batch],
    axis: str,
    limit: float = GAP_LIMIT,
    reach: float = 4.0,
    tolerance: float = 0.05,
    measure: Measure = "logits",
) -> SafeRange:
    """Finds the λ of one axis up to which its linearity gap stays within a limit, on each side of 0.

    Args:
        model: a `PeftModel` with tangent axes; the active mix does not count and stays.
        batches: as of `linearity_profile`; a list or another collection, for it is gone through several times.
        axis: the axis.
        limit: of the gap.
        reach: how far |λ| is followed.
        tolerance: how exactly a bound is to be known, in λ.
        measure: the gap of the logits, or that of the log-probs; both are defined in `linearity_profile`.

    Returns:
        The range; a bound that was not met within `reach` says "at least".

    Raises:
        TypeError: if the model carries no tangent axes, or `batches` is an iterator.
        ValueError: for an unknown axis, disabled or merged adapters, batches without tokens, a limit, reach or
            tolerance that is not positive, or an unknown measure.
    """
    check_limit(limit)
    _check_options(batches, reach, tolerance, measure)
    runs = MixLogits(model, [axis])
    tokens = 0

    def gaps(places: Sequence[float]) -> dict[float, float]:
        nonlocal tokens
        sums = measure_sums(runs, batches, {axis: places}, divergences=False)
        tokens = positions(next(iter(sums.values())))
        found = {place: as_gap(sums[axis, place], measure == "log_probs") for place in places}
        return {place: gap if math.isfinite(gap) else math.inf for place, gap in found.items()}

    sides = _search(gaps, limit, reach, max(tolerance, FINEST * reach))
    low, high = sides[-1.0], sides[1.0]
    probes = sorted([*low.probes, *high.probes], key=lambda probe: probe.weight)
    return SafeRange(
        axis=axis,
        low=0.0 - low.inside,
        high=high.inside,
        low_is_bound=low.outside is not None,
        high_is_bound=high.outside is not None,
        low_is_monotone=low.is_monotone,
        high_is_monotone=high.is_monotone,
        limit=limit,
        measure=measure,
        reach=reach,
        tolerance=tolerance,
        probes=probes,
        norm=axis_norm(runs.tuner.model, axis),
        tokens=tokens,
        dtype=runs.dtype,
    )


def store_safe_range(model: nn.Module, found: SafeRange | None, axis: str | None = None) -> None:
    """Keeps a safe range with its axis: `combine_axes` and the exports warn by it, `save_pretrained` saves it.

    Training the axis drops it. A mix stored as an axis of its own, and any other axis made from this one, has none.

    Args:
        model: the model it was measured on.
        found: the range; `None` takes away the one that is stored with `axis`.
        axis: the axis; by default that of the range, under another name if it was loaded so.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for an unknown axis, or one that is not the one that was measured; for a range that is rounding.
    """
    tuner = tangent_tuner(model)
    name = axis if axis is not None else None if found is None else found.axis
    if name is None:
        raise ValueError("Name the `axis` whose safe range is to be taken away.")
    check_known(tuner, [name])
    if found is not None:
        check_not_rounding(found)
    if found is not None and not is_of_this_tangent(found.stored, norm := axis_norm(tuner.model, name)):
        raise ValueError(
            f"The safe range was measured on an axis with ‖τ‖ = {found.norm:.4g}, but that of {name!r} is {norm:.4g}: "
            "it is another axis, or was trained since. Measure it again."
        )
    store_range(tuner, name, None if found is None else found.stored)


def check_not_rounding(found: SafeRange) -> None:
    """Refuses to store a range of which the rounding of the model's dtype is a bound.

    Raises:
        ValueError: saying so.
    """
    if found.is_rounding:
        raise ValueError(
            f"The safe range of {found.axis} ({found.text}) is a matter of rounding in {found.dtype}: at larger λ the "
            "gap is within the limit again. Measure it with the base in float32 (`model.float()`)."
        )


def _check_options(batches: Sequence[Batch], reach: float, tolerance: float, measure: str) -> None:
    if isinstance(batches, Iterator):
        raise TypeError(
            f"`batches` is a {type(batches).__name__}, which can be gone through once only; the search takes several "
            "passes. Give `list(batches)`."
        )
    for name, value in (("reach", reach), ("tolerance", tolerance)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"`{name}` is a positive number; found {value!r}.")
    if measure not in ("logits", "log_probs"):
        raise ValueError(f"`measure` is 'logits' or 'log_probs', found {measure!r}.")


# ---- the search ------------------------------------------------------------------------------------------------------


@dataclass
class _Side:
    """What is known of one sign of λ; all |λ|."""

    limit: float
    gaps: dict[float, float]  # by |λ|
    sign: float

    @property
    def inside(self) -> float:
        """The largest |λ| within the limit before the first that is not; 0 where there is none."""
        below = [place for place in self.gaps if self.outside is None or place < self.outside]
        return max(below, default=0.0)

    @property
    def outside(self) -> float | None:
        """The smallest |λ| over the limit."""
        return min((place for place, gap in self.gaps.items() if not gap <= self.limit), default=None)

    @property
    def width(self) -> float:
        """Of the bracket; 0 where the limit is not met."""
        return 0.0 if self.outside is None else self.outside - self.inside

    @property
    def is_monotone(self) -> bool:
        found = [gap for _, gap in sorted(self.gaps.items())]
        return all(later >= (1 - FALL) * earlier for earlier, later in pairwise(found))

    @property
    def probes(self) -> list[GapProbe]:
        return [GapProbe(self.sign * place, gap) for place, gap in self.gaps.items()]

    def next(self, tolerance: float, halved: bool) -> list[float]:
        """Where to measure next, inside the bracket."""
        low, high = self.inside, self.outside or 0.0
        middle = [(low + high) / 2]
        expected = self._crossing(low, high) if halved else math.nan
        if not low < expected < high:
            return middle
        step = BESIDE * tolerance
        beside = [place for place in (expected - step, expected + step) if low < place < high]
        return beside or middle

    def _crossing(self, low: float, high: float) -> float:
        """Where a power law through the ends of the bracket meets the limit; a proportional gap if one end is 0."""
        above, below = self.gaps[high], self.gaps.get(low, 0.0)
        if not math.isfinite(above):
            return math.nan
        if below <= 0.0 or above <= below:
            return high * self.limit / above
        power = math.log(above / below) / math.log(high / low)
        return low * math.exp(math.log(self.limit / below) / power)


def _search(
    gaps: Callable[[Sequence[float]], dict[float, float]], limit: float, reach: float, tolerance: float
) -> dict[float, _Side]:
    """Brackets the limit on both sides at once, each pass over the data measuring what both ask for."""
    scan = [reach * share for share in SCAN]
    sides = {sign: _Side(limit, {}, sign) for sign in (-1.0, 1.0)}
    asked = dict.fromkeys(sides, scan)
    halved = dict.fromkeys(sides, True)
    while any(asked.values()):
        before = {sign: side.width for sign, side in sides.items()}
        found = gaps([sign * place for sign, places in asked.items() for place in places])
        for sign, places in asked.items():
            side = sides[sign]
            side.gaps.update({place: found[sign * place] for place in places})
            halved[sign] = before[sign] == 0.0 or side.width <= before[sign] / 2
            open_still = side.width > tolerance
            asked[sign] = side.next(tolerance, halved[sign]) if open_still else []
    return sides
