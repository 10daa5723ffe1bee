"""How far the network at the weights θ₀ + λτ is from the linearized model, axis by axis and λ by λ.

At each λ two models stand beside each other: the ordinary network f(θ₀ + λτ), which merging and exporting give, and
f_lin = f₀ + λ Jτ, which was trained. All of f_lin(λ) follows from one linearized pass; only the network runs again:

    gap             ‖f(θ₀ + λτ) − f_lin‖ / ‖f_lin − f₀‖                          on the logits
    log-prob gap    ‖log π_λ − log π_lin‖ / ‖log π_lin − log π₀‖                 on their log-softmax
    effect          ‖f_lin − f₀‖ / ‖f₀‖
    KL              Σᵥ π(v) log π(v)/π₀(v), mean over positions, nats per token  of π_λ, of π_lin, and of π_λ to π_lin

π_λ, π_lin, π₀ are the softmax of f(θ₀ + λτ), f_lin, f₀. Norms are over all positions and the whole vocabulary, each
entry with the same weight, so the log-prob gap looks at rare tokens as much as at likely ones; the KLs weigh by
probability. To first order both gaps grow in proportion to |λ| (arXiv 2602.01128 states none of these numbers; they
are ours). The gap is that of `linearity_gap`, of which this is the profile.

Where the model caps its logits (Gemma 2), the cap is applied to f₀ + λ Jτ, and f_lin is not in proportion to λ. That is
seen at the largest λ asked for; the linearized model then runs again at every λ as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from tangent_peft.diagnose.linearity.divergence import kl, token_slices
from tangent_peft.diagnose.linearity.mix_logits import Batch, MixLogits, Part
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.tuner.linearity import GAP_LIMIT


WEIGHTS = (-3.0, -2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0)
PROBE = 1 / 16  # λ at which rounding is looked for, unless the smallest one measured is not four times as large
ROUNDING_SHARE = 0.5  # of a gap, from which it is called rounding
STEP = {torch.bfloat16: 16.0}  # λ at which Jτ is read off: large where rounding to the size of f₀ would drown it
BENT = {torch.bfloat16: 5e-2, torch.float16: 5e-2}  # share of f_lin − f₀ from which it is not in proportion to λ
STRAIGHT = 1e-3  # the same in other dtypes
_MISSED, _MOVED, _SIZE, _MISSED_LOG, _MOVED_LOG, _KL, _KL_LIN, _KL_APART, _TOKENS = range(9)  # of `_sums`


@dataclass(frozen=True)
class LinearityPoint:
    """One axis alone at one λ.

    Attributes:
        axis: its name.
        weight: λ.
        gap: on the logits; 0 where the axis changes nothing, NaN where logits are not finite.
        gap_log_probs: on the log-probs.
        effect: how much the linearized axis changes the logits, as a share of them.
        kl: KL(π_λ ‖ π₀) of the network at the weights, nats per token.
        kl_linearized: KL(π_lin ‖ π₀).
        kl_apart: KL(π_λ ‖ π_lin).
        rounding: about how much the rounding of the dtype adds to `gap`, judged from the gap at a small λ, where the
            network is as good as linear; NaN for λ = 0.
    """

    axis: str
    weight: float
    gap: float
    gap_log_probs: float
    effect: float
    kl: float
    kl_linearized: float
    kl_apart: float
    rounding: float

    @property
    def is_rounding(self) -> bool:
        """Whether rounding may make up half of the gap or more."""
        return self.rounding >= ROUNDING_SHARE * self.gap > 0.0


@dataclass(frozen=True)
class LinearityProfile(Diagnosis):
    """Result of `linearity_profile`.

    Attributes:
        points: by axis, then by λ.
        limit: the gap up to which merging is called safe.
        tokens: number of positions it was measured on.
        dtype: in which the model computes.
    """

    title: ClassVar[str] = "Linearity: the network at the weights θ(λ) against the linearized model"

    points: list[LinearityPoint]
    limit: float
    tokens: int
    dtype: str

    @property
    def axes(self) -> list[str]:
        """The axes, in order."""
        return list(dict.fromkeys(point.axis for point in self.points))

    def of(self, axis: str) -> list[LinearityPoint]:
        """The points of one axis, by λ."""
        return [point for point in self.points if point.axis == axis]

    def tables(self) -> list[Table]:
        """One table; a row for each axis and λ."""
        columns = ["axis", "λ", "gap", "gap (log-probs)", "effect", "KL", "KL lin.", "KL apart", "rounding ~"]
        rows: list[list[Cell]] = [
            [p.axis, p.weight, p.gap, p.gap_log_probs, p.effect, p.kl, p.kl_linearized, p.kl_apart, p.rounding]
            for p in self.points
        ]
        note = (
            f"{self.tokens} positions, {self.dtype}. gap: ‖f(θ₀+λτ) − f_lin‖ / ‖f_lin − f₀‖ on logits; on log-probs "
            "over ‖log π_lin − log π₀‖. KL, nats per token: of the network at the weights to the base, of the "
            "linearized model to the base, of the network to the linearized model. rounding: about so much of the gap."
        )
        return [Table("One axis at a time", columns, rows, note)]

    def verdicts(self) -> list[Verdict]:
        """For each axis, where its gap is within the limit, and whether that is rounding."""
        return [verdict for axis in self.axes for verdict in self._judge(axis)]

    def _judge(self, axis: str) -> list[Verdict]:
        points = [point for point in self.of(axis) if point.weight != 0.0]
        if not any(point.effect for point in points) and any(point.gap for point in points):
            text = f"{axis} changes no logit linearized, but the network does change: merged it is another model."
            return [Verdict("warning", text)]
        if any(not math.isfinite(point.gap) for point in points):
            lost = [f"{point.weight:g}" for point in points if not math.isfinite(point.gap)]
            return [Verdict("unknown", f"{axis}: logits are not finite at λ = {', '.join(lost)}; use float32.")]
        if not any(point.effect for point in points):
            return [Verdict("unknown", f"{axis} changes no logit: it is untrained, or acts nowhere on these tokens.")]
        found = []
        rounded = [point for point in points if point.is_rounding]
        if rounded:
            text = ", ".join(f"{point.weight:g}" for point in rounded)
            found.append(
                Verdict(
                    "unknown",
                    f"{axis}: at λ = {text} rounding in {self.dtype} may be half of the gap or more. Measure with the "
                    "base in float32, or look at larger λ.",
                )
            )
        over = [point for point in points if point.gap > self.limit and not point.is_rounding]
        if over:
            worst = max(over, key=lambda point: point.gap)
            text = (
                f"{axis}: the gap is over {self.limit:g} at λ = {', '.join(f'{point.weight:g}' for point in over)} (up "
                f"to {worst.gap:.2f}). There a merged model is another model: judge it on its own."
            )
            found.append(Verdict("warning", text))
        elif len(rounded) < len(points):
            low, high = min(point.weight for point in points), max(point.weight for point in points)
            largest = max(point.gap for point in points if not point.is_rounding)
            text = f"{axis}: the gap is at most {largest:.2f} at the λ measured, from {low:g} to {high:g}"
            found.append(Verdict("fine", f"{text} (limit {self.limit:g})."))
        return found

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws gaps and KL against λ into `linearity.png` and `.svg`."""
        from tangent_peft.diagnose.linearity.plots import plot_profile

        return [plot_profile(self, Path(folder) / "linearity.png")]


def linearity_profile(
    model: nn.Module,
    batches: Iterable[Batch],
    axes: Sequence[str] | None = None,
    weights: Sequence[float] = WEIGHTS,
    limit: float = GAP_LIMIT,
    progress: Callable[[], None] | None = None,
) -> LinearityProfile:
    """Measures gap, effect and KL of each axis alone at each λ.

    For each part of a batch: one forward of the base, one linearized forward per axis (one more for the first part; one
    per λ where the model caps its logits), one ordinary forward per axis and λ, all above the frozen trunk, which runs
    once. Memory does not grow with the number of batches.

    Args:
        model: a `PeftModel` with tangent axes; the active mix does not count and stays.
        batches: model inputs with `input_ids` (B, T) and, if padded, `attention_mask` (B, T), of which all real
            positions count; or `TokenBatch`es, which name the positions.
        axes: the axes to measure; all by default.
        weights: λ, any finite numbers; 0 gives the base.
        limit: the gap up to which merging is called safe.
        progress: called after each forward of a network at some λ.

    Returns:
        The profile; it prints, saves itself as JSON and draws itself.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for an unknown axis, no λ or one that is not finite, disabled or merged adapters, batches without
            tokens, or a limit that is not positive.
    """
    places = sorted({_finite(weight) for weight in weights})
    if not places:
        raise ValueError("No λ are given to measure at. Give at least one in `weights`.")
    check_limit(limit)
    runs = MixLogits(model, axes)
    probe = min([PROBE, *(abs(place) / 4 for place in places if place)])
    asked = {axis: [*places, probe] for axis in runs.axes}
    sums = measure_sums(runs, batches, asked, progress=progress)
    points = []
    for axis in runs.axes:
        noise = as_gap(sums[axis, probe]) * probe
        points += [_point(axis, place, sums[axis, place], noise) for place in places]
    return LinearityProfile(points, limit, int(sums[runs.axes[0], probe][_TOKENS]), runs.dtype)


def check_limit(limit: float) -> None:
    """Raises a `ValueError` for a limit of the gap that is not a positive number."""
    if not (math.isfinite(limit) and limit > 0):
        raise ValueError(f"`limit` is the largest gap to accept, a positive number; found {limit!r}. Usual is 0.5.")


def _finite(weight: float) -> float:
    if not math.isfinite(weight):
        raise ValueError(f"`weights` holds {weight!r}; λ must be finite numbers.")
    return float(weight)


def measure_sums(
    runs: MixLogits,
    batches: Iterable[Batch],
    asked: Mapping[str, Sequence[float]],
    divergences: bool = True,
    progress: Callable[[], None] | None = None,
) -> dict[tuple[str, float], Tensor]:
    """The sums from which gaps and KL are made, of each axis at each λ asked for.

    Args:
        runs: of the axes.
        batches: what to measure on, gone through once.
        asked: λ by axis.
        divergences: also the sums of the KLs, which otherwise are 0.
        progress: called after each forward of a network at some λ.

    Returns:
        By axis and λ, sums in float64: squares of what is missed, moved and there on the logits, of what is missed and
        moved on the log-probs, three KLs, and the number of positions.
    """
    sums = {(axis, place): torch.zeros(9, dtype=torch.float64) for axis, places in asked.items() for place in places}
    straight: dict[str, bool] = {}  # by axis; seen on the first part
    with runs.ready():
        for part in runs.parts(batches):
            base = part.base()
            for axis, places in asked.items():
                change = _slope(part, base, axis, runs.torch_dtype)
                if axis not in straight:
                    straight[axis] = _is_straight(part, base, axis, change, max(places, key=abs), runs.torch_dtype)
                for place in places:
                    network = part.weights({axis: place})
                    moved = None if straight[axis] else part.linearized({axis: place}).sub_(base)
                    for at in token_slices(*base.shape):
                        here = change[at] * place if moved is None else moved[at]
                        sums[axis, place] += _sums(network[at], base[at], here, divergences)
                    if progress is not None:
                        progress()
    return sums


def _slope(part: Part, base: Tensor, axis: str, dtype: torch.dtype) -> Tensor:
    """Jτ (n, V) of one axis, if f_lin is in proportion to λ."""
    step = STEP.get(dtype, 1.0)
    return part.linearized({axis: step}).sub_(base).div_(step)


def _is_straight(part: Part, base: Tensor, axis: str, change: Tensor, far: float, dtype: torch.dtype) -> bool:
    """Whether f_lin − f₀ at λ = `far` is `far` times `change`."""
    moved = part.linearized({axis: far}).sub_(base)
    missed = moved - change * far
    return bool(missed.norm() <= BENT.get(dtype, STRAIGHT) * moved.norm())


def _sums(network: Tensor, base: Tensor, moved: Tensor, divergences: bool) -> Tensor:
    """The sums of one tile (n, V) of f(θ₀ + λτ), f₀ and f_lin − f₀."""
    linear = base + moved
    missed = network - linear
    ends = [logits.logsumexp(-1, keepdim=True) for logits in (network, linear, base)]
    squares = [missed, moved, base, missed - (ends[0] - ends[1]), moved - (ends[1] - ends[2])]
    found = [x.square().sum(dtype=torch.float64) for x in squares]
    if divergences:
        found += [kl(network, base).sum(), kl(linear, base).sum(), kl(network, linear).sum()]
    else:
        found += [torch.zeros((), dtype=torch.float64, device=base.device)] * 3
    return torch.stack([*found, torch.full_like(found[0], len(base))]).cpu()


def as_gap(sums: Tensor, log_probs: bool = False) -> float:
    """The gap that the sums of `measure_sums` are; 0 where nothing is moved, in neither of the models."""
    missed, moved = (float(sums[at]) for at in ((_MISSED_LOG, _MOVED_LOG) if log_probs else (_MISSED, _MOVED)))
    if moved == 0.0:
        return math.inf if missed else 0.0
    return math.sqrt(missed / moved)


def positions(sums: Tensor) -> int:
    """How many positions the sums of `measure_sums` are over."""
    return int(sums[_TOKENS])


def _point(axis: str, place: float, sums: Tensor, noise: float) -> LinearityPoint:
    tokens = float(sums[_TOKENS])
    size = float(sums[_SIZE])
    return LinearityPoint(
        axis=axis,
        weight=place,
        gap=as_gap(sums),
        gap_log_probs=as_gap(sums, log_probs=True),
        effect=math.sqrt(float(sums[_MOVED]) / size) if size else 0.0,
        kl=float(sums[_KL]) / tokens,
        kl_linearized=float(sums[_KL_LIN]) / tokens,
        kl_apart=float(sums[_KL_APART]) / tokens,
        rounding=noise / abs(place) if place else math.nan,
    )
