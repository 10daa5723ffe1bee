"""One objective's held-out pairs through the stages of a training: standings, paired changes, quartiles.

Works on log-probs alone; `forgetting.py` has the definitions and puts objectives together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor


BASE = "base"
MIN_PAIRS = 8  # for quartiles: two pairs each
RANKINGS = ("stage", "base")
LEVEL = 0.05  # of the t-tests by which a mean is called different from 0, two-sided
MANY = 1000  # degrees of freedom from which Student's t is taken for a normal distribution

Pattern: TypeAlias = Literal["partial degradation", "stability", "redistribution", "positive transfer", "unknown"]
Role: TypeAlias = Literal["trained", "previous", "later"]


@dataclass(frozen=True)
class ObjectiveScores:
    """Scores of an objective's N held-out pairs, the chosen answer first; as `evaluate.pair_logps` gives them.

    Attributes:
        reference: log π₀ (N, 2) of the base, in nats.
        stages: log π (N, 2) after each stage, in order.
        lengths: tokens (N, 2) of the answers.
    """

    reference: Tensor
    stages: Sequence[Tensor]
    lengths: Tensor


@dataclass(frozen=True)
class Standing:
    """One cell of the transfer matrix: an objective after a stage; `stage` is `"base"` before the first.

    Attributes:
        objective: whose pairs.
        stage: after which.
        margin: mean of m.
        margin_error: its standard error over the pairs.
        accuracy: share of pairs with m > 0, ties half; 0.5 at the base.
        policy_margin: mean of g, nats per token.
        policy_accuracy: share of pairs with g > 0, ties half.
    """

    objective: str
    stage: str
    margin: float
    margin_error: float
    accuracy: float
    policy_margin: float
    policy_accuracy: float


@dataclass(frozen=True)
class Change:
    """An objective from one stage to the next, pair by pair.

    Attributes:
        objective: whose pairs.
        before: the earlier stage.
        after: the later stage.
        role: of the objective in the later stage: it is trained in it, was before, or comes later (or never).
        pairs: N.
        margin: mean change of m.
        margin_error: its standard error, of the paired differences.
        accuracy: change of the share with m > 0.
        policy_margin: mean change of g.
        policy_margin_error: likewise.
        improved: share of pairs whose g rises.
        lost: share of pairs whose g goes from above 0 to below.
        gained: share of pairs whose g goes from below 0 to above.
        pattern: what to call it; see `pattern_of`. Means little of an objective that the stage trains.
    """

    objective: str
    before: str
    after: str
    role: Role
    pairs: int
    margin: float
    margin_error: float
    accuracy: float
    policy_margin: float
    policy_margin_error: float
    improved: float
    lost: float
    gained: float
    pattern: Pattern


@dataclass(frozen=True)
class Quartile:
    """A quarter of an objective's pairs, from one stage to the next.

    Attributes:
        objective: whose pairs.
        before: the earlier stage.
        after: the later stage.
        ranked_by: `"stage"`: g after the earlier stage; `"base"`: g of the base model.
        quartile: 1 (lowest g) to 4.
        pairs: how many.
        low: least g of the ranking.
        high: largest.
        change: mean change of g; NaN with fewer than 8 pairs in all.
        error: its standard error.
        improved: share of pairs whose g rises.
        lost: share whose g goes from above 0 to below.
        gained: share whose g goes from below 0 to above.
    """

    objective: str
    before: str
    after: str
    ranked_by: str
    quartile: int
    pairs: int
    low: float
    high: float
    change: float
    error: float
    improved: float
    lost: float
    gained: float


# ---- the numbers -----------------------------------------------------------------------------------------------------


def check_scores(scores: Mapping[str, ObjectiveScores], stages: list[str], beta: float) -> None:
    """Raises a `ValueError` that names the first thing that does not fit; see `forgetting`."""
    if not stages or len(set(stages)) < len(stages):
        raise ValueError(f"`stages` names each trained objective once, in order; found {stages}.")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"`beta` is the β of the training, a positive number; found {beta!r}.")
    if missing := [stage for stage in stages if stage not in scores]:
        raise ValueError(
            f"`scores` has {sorted(scores)} and lacks {missing}, which were trained. Score their pairs too."
        )
    for objective, found in scores.items():
        if len(found.stages) != len(stages):
            raise ValueError(
                f"{objective!r} is scored after {len(found.stages)} stages, but {len(stages)} were trained: {stages}. "
                "Score every objective after every stage."
            )
        named = {"reference": found.reference, "lengths": found.lengths}
        named |= {f"stages[{n}]": x for n, x in enumerate(found.stages)}
        for name, x in named.items():
            if x.ndim != 2 or x.shape[1] != 2 or len(x) != len(found.reference) or not len(x):
                raise ValueError(
                    f"`{name}` of {objective!r} has shape {tuple(x.shape)}; expected (N, 2), chosen first, with the "
                    f"same N ≥ 1 as `reference`, {tuple(found.reference.shape)}."
                )
            if not bool(torch.isfinite(x.double()).all()):
                row = int((~torch.isfinite(x.double())).any(1).nonzero()[0])
                raise ValueError(f"`{name}` of {objective!r} is not finite at pair {row}. Leave that pair out.")
        if bool((found.lengths < 1).any()):
            row, side = (found.lengths < 1).nonzero()[0].tolist()
            raise ValueError(
                f"Pair {row} of {objective!r} has an empty {('chosen', 'rejected')[side]} completion, whose "
                "log-prob per token is not defined. Leave that pair out."
            )


class Followed:
    """One objective's pairs: m and g (S + 1, N), the base first.

    Args:
        objective: its name.
        scores: its pairs'.
        stages: the objectives in the order they were trained in.
        beta: β of m.
    """

    def __init__(self, objective: str, scores: ObjectiveScores, stages: list[str], beta: float) -> None:
        self.objective, self.order, self.names = objective, stages, [BASE, *stages]
        logps = torch.stack([scores.reference.double(), *(x.double() for x in scores.stages)])
        gains, per_token = logps - logps[0], logps / scores.lengths.double()
        self.m = beta * (gains[..., 0] - gains[..., 1])
        self.g = per_token[..., 0] - per_token[..., 1]

    def standings(self) -> list[Standing]:
        """At the base and after every stage."""
        return [
            Standing(self.objective, name, *mean_and_error(m), _wins(m), float(g.mean()), _wins(g))
            for name, m, g in zip(self.names, self.m, self.g, strict=True)
        ]

    def changes(self, quartiles: Sequence[Quartile]) -> list[Change]:
        """From each stage to the next, the first from the base; `quartiles` decide between two patterns."""
        found = []
        for after in range(1, len(self.names)):
            (m0, m1), (g0, g1) = self.m[after - 1 : after + 1], self.g[after - 1 : after + 1]
            margin, error = mean_and_error(m1 - m0)
            label = (self.objective, self.names[after - 1], self.names[after])
            of_base = [q for q in quartiles if q.after == self.names[after] and q.ranked_by == "base"]
            pattern = pattern_of(margin, error, len(m0), of_base)
            policy = (*mean_and_error(g1 - g0), *_flips(g0, g1))
            found.append(
                Change(*label, self._role(after), len(m0), margin, error, _wins(m1) - _wins(m0), *policy, pattern)
            )
        return found

    def _role(self, after: int) -> Role:
        if self.order[after - 1] == self.objective:
            return "trained"
        return "previous" if self.objective in self.order[: after - 1] else "later"

    def quartiles(self) -> Iterator[Quartile]:
        """Of each change after the first stage, under both rankings; NaN for fewer than 8 pairs."""
        for after in range(2, len(self.names)):
            g0, g1 = self.g[after - 1], self.g[after]
            for ranked_by, key in zip(RANKINGS, (g0, self.g[0]), strict=True):
                parts = key.argsort(stable=True).tensor_split(4)
                for number, rows in enumerate(parts, start=1):
                    label = (self.objective, self.names[after - 1], self.names[after], ranked_by, number)
                    if len(g0) < MIN_PAIRS:
                        yield Quartile(*label, len(rows), *[math.nan] * 7)
                        continue
                    ends = float(key[rows].min()), float(key[rows].max())
                    change = mean_and_error((g1 - g0)[rows])
                    yield Quartile(*label, len(rows), *ends, *change, *_flips(g0[rows], g1[rows]))


def mean_and_error(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """Mean of values (N,) and its standard error; NaN for one value."""
    values = torch.as_tensor(values, dtype=torch.float64)
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), error


def _wins(values: Tensor) -> float:
    return float((values > 0).double().mean() + 0.5 * (values == 0).double().mean())


def _flips(before: Tensor, after: Tensor) -> tuple[float, float, float]:
    """Shares of values (N,) that rise, that go from above 0 to below, and from below to above."""
    rows = (after > before, (before > 0) & (after < 0), (before < 0) & (after > 0))
    improved, lost, gained = (float(row.double().mean()) for row in rows)
    return improved, lost, gained


def pattern_of(margin: float, error: float, pairs: int, quartiles: Sequence[Quartile]) -> Pattern:
    """What to call the change of an objective.

    Args:
        margin: mean change of m.
        error: its standard error.
        pairs: how many.
        quartiles: of the same change, ranked by the base's g; may be empty.

    Returns:
        `"partial degradation"` and `"positive transfer"` where the mean differs from 0 (see `differs`);
        `"redistribution"` where it does not, but the mean change of g of some quartile differs from that of the other
        three, tested as one of four; a change that all quartiles have alike is none;
        else `"stability"`, or `"unknown"` for fewer than two pairs.
    """
    if not math.isfinite(error):
        return "unknown"
    if differs(margin, error, pairs):
        return "positive transfer" if margin > 0 else "partial degradation"
    if any(differs(*contrast([q], [r for r in quartiles if r is not q]), tests=4) for q in quartiles):
        return "redistribution"
    return "stability"


def contrast(first: Sequence[Quartile], second: Sequence[Quartile]) -> tuple[float, float, int]:
    """By how much more some quartiles change than others, for `differs`: Welch's t-test of two means.

    Args:
        first: some quartiles of one change and ranking.
        second: others of them.

    Returns:
        Mean change of g of the pairs in the first minus that of the pairs in the second; its standard error; and how
        many pairs a paired test of so many degrees of freedom has (Welch–Satterthwaite, rounded down).
    """
    (mean, error, count), (other, other_error, others) = _pooled(first), _pooled(second)
    squares = error**2, other_error**2
    total = sum(squares)
    if not total > 0.0:
        return mean - other, math.sqrt(total), count + others - 1
    freedom = total**2 / (squares[0] ** 2 / (count - 1) + squares[1] ** 2 / (others - 1))
    return mean - other, math.sqrt(total), math.floor(freedom + 1e-9) + 1


def _pooled(quartiles: Sequence[Quartile]) -> tuple[float, float, int]:
    """Mean change of the pairs of several quartiles, its standard error, and their number."""
    count = sum(q.pairs for q in quartiles)
    if count < 2:
        return math.nan, math.nan, count
    mean = sum(q.pairs * q.change for q in quartiles) / count
    squares = sum((q.pairs - 1) * q.pairs * q.error**2 + q.pairs * (q.change - mean) ** 2 for q in quartiles)
    return mean, math.sqrt(squares / (count - 1) / count), count


def differs(mean: float, error: float, pairs: int, tests: int = 1) -> bool:
    """Whether a mean differs from 0: Student's t-test, two-sided, at 5 %.

    Args:
        mean: of paired differences.
        error: its standard error.
        pairs: how many.
        tests: how many such means are looked at, for the largest of them; the level is divided by it (Bonferroni).

    Returns:
        `False` also where there is no error, as of a single pair.
    """
    if pairs < 2 or not math.isfinite(error):
        return False
    if error == 0.0:
        return mean != 0.0
    return student_within(abs(mean) / error, pairs - 1) > 1 - LEVEL / tests


def student_within(t: float, freedom: int) -> float:
    """P(|T| < t) of Student's t (Abramowitz & Stegun, 26.7.3 and 26.7.4).

    Args:
        t: at least 0.
        freedom: degrees of freedom, at least 1.
    """
    if freedom > MANY:
        return math.erf(t / math.sqrt(2))
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for n in range(2 + odd, freedom + 1, 2):
        total += term
        term *= (n - 1) / n * math.cos(angle) ** 2
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total
