"""How much two sets of shifts have in common: cosines, canonical correlations against chance, CKA. Knows no model.

A shift is what an axis adds to a hidden state; there is a row for each prompt. TS-DPO (arXiv 2602.01128, §4.4) compares
two axes by the CCA spectrum of their shifts; which layer, which token and how many directions it does not say, so those
choices are ours and stand in the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tangent_peft.diagnose.interference.canonical import (
    LEAST_ROWS,
    ROWS_PER_DIRECTION,
    Array,
    Principal,
    Rows,
    area_under,
    check_rows,
    chunked,
    correlations,
    linear_cka,
    permuted_correlations,
    principal,
    projection_weighted,
    whitened,
)
from tangent_peft.diagnose.spool import Spool


ENERGY = 0.99  # share of the variance that SVCCA keeps (arXiv 1706.05806)
PERMUTATIONS = 200


@dataclass(frozen=True)
class Canonical:
    """The canonical correlations of two sets of rows. Numbers that can not be had are NaN, and `reason` says why.

    Attributes:
        directions: k of each set, the principal directions that were kept.
        variance: the share of the variance in them.
        correlations: ρ, falling, min(k, k') of them.
        mean: their mean, the SVCCA similarity.
        area: ∫ρ over the spectrum laid out on [0, 1], which is small where it decays fast; NaN for a single ρ.
        pwcca: the mean weighted by what each variate accounts for in the first, and in the second set.
        null_mean: mean of `mean` over random pairings of the rows.
        null_95: its 95 % quantile.
        null_spectrum: 95 % quantile of each ρ over random pairings.
        p_value: share of the pairings, the given one among them, with as large a mean ρ.
        permutations: how many random pairings.
        seed: of the pairings.
        reason: why numbers are missing; empty if none is.
    """

    directions: tuple[int, int] = (0, 0)
    variance: tuple[float, float] = (math.nan, math.nan)
    correlations: list[float] = field(default_factory=list)
    mean: float = math.nan
    area: float = math.nan
    pwcca: tuple[float, float] = (math.nan, math.nan)
    null_mean: float = math.nan
    null_95: float = math.nan
    null_spectrum: list[float] = field(default_factory=list)
    p_value: float = math.nan
    permutations: int = 0
    seed: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Overlap:
    """Result of `shift_overlap`.

    Attributes:
        prompts: N, the number of rows.
        size: d, the dimensions of a row.
        cosine: mean over the prompts of the cosine of the two shifts, uncentred, in [−1, 1]; of the prompts at which
            neither is zero. NaN if there is none.
        cosine_quantiles: its 5 %, 50 % and 95 % quantiles over the prompts.
        cosine_of_means: cosine of the two mean shifts.
        mean_share: of each set, the share of the energy that lies in its mean: what centring, and so CCA and CKA,
            leave out.
        cca: canonical correlations.
        cka: linear CKA as published, which is biased towards 1 for N below d.
        cka_debiased: the same with unbiased HSIC; about 0 for what is independent.
    """

    prompts: int
    size: int
    cosine: float
    cosine_quantiles: tuple[float, float, float]
    cosine_of_means: float
    mean_share: tuple[float, float]
    cca: Canonical
    cka: float
    cka_debiased: float


def shift_overlap(
    first: Rows,
    second: Rows,
    *,
    components: int | None = None,
    energy: float = ENERGY,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> Overlap:
    """What two sets of shifts have in common.

    CCA: both sets are centred and reduced by PCA to the directions that hold `energy` of their variance, at most
    min(d, N/5) of them. The chance level is that of random pairings of the rows.

    Args:
        first: shifts (N, d), one row per prompt; an array, or one that lies in a file.
        second: shifts (N, d') about the same prompts; cosines need d' = d.
        components: directions to keep at most, in place of min(d, N/5).
        energy: share of the variance to keep, in (0, 1].
        permutations: random pairings for the chance level; 0 for none.
        seed: of the pairings.

    Returns:
        All numbers; those of CCA are NaN with a `reason` below 10 prompts or where a set does not vary.

    Raises:
        ValueError: if shapes or settings do not fit, or an entry is not finite.
    """
    check_rows(first, second)
    check_overlap_settings(len(first), components, energy, permutations)
    sides = (principal(first), principal(second))
    limit = components or len(first) // ROWS_PER_DIRECTION
    reason = _reason(len(first), sides)
    if reason:
        cca = Canonical(permutations=permutations, seed=seed, reason=reason)
    else:
        kept = (sides[0].kept(energy, limit), sides[1].kept(energy, limit))
        cca = _canonical((first, second), sides, kept, permutations, seed)
    cosines, of_means = _cosines(first, second, sides)
    quantiles = np.quantile(cosines, [0.05, 0.5, 0.95]).tolist() if len(cosines) else [math.nan] * 3
    cka, debiased = linear_cka(first, second)
    return Overlap(
        prompts=len(first),
        size=first.shape[1],
        cosine=float(cosines.mean()) if len(cosines) else math.nan,
        cosine_quantiles=(quantiles[0], quantiles[1], quantiles[2]),
        cosine_of_means=of_means,
        mean_share=(sides[0].mean_share, sides[1].mean_share),
        cca=cca,
        cka=cka,
        cka_debiased=debiased,
    )


def check_overlap_settings(count: int, components: int | None, energy: float, permutations: int) -> None:
    """Refuses settings under which CCA says nothing.

    Raises:
        ValueError: naming the setting.
    """
    limit = count // ROWS_PER_DIRECTION
    if components is not None and not 1 <= components <= max(1, limit):
        raise ValueError(
            f"components={components} directions of {count} prompts: CCA needs {ROWS_PER_DIRECTION} prompts for each, "
            f"or it finds correlations near 1 in noise. Keep at most {max(1, limit)}, or give more prompts."
        )
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy={energy} is a share of the variance to keep, above 0 and at most 1.")
    if permutations < 0:
        raise ValueError(f"permutations={permutations}; give a number of random pairings, or 0 for none.")


def _reason(count: int, sides: tuple[Principal, Principal]) -> str:
    if count < LEAST_ROWS:
        return f"{count} prompts are too few for CCA, which needs {LEAST_ROWS} for two directions"
    for name, side in zip(("first", "second"), sides, strict=True):
        if not len(side.values):
            zero = math.isnan(side.mean_share)
            return f"the {name} shift is " + ("zero for every prompt" if zero else "the same for every prompt")
    return ""


def _canonical(
    rows: tuple[Rows, Rows],
    sides: tuple[Principal, Principal],
    kept: tuple[int, int],
    permutations: int,
    seed: int,
) -> Canonical:
    with Spool((kept[0],)) as one, Spool((kept[1],)) as other:
        q_a, q_b = whitened(rows[0], sides[0], kept[0], one), whitened(rows[1], sides[1], kept[1], other)
        u, rho, v = correlations(q_a, q_b)
        null = permuted_correlations(q_a, q_b, permutations, seed)
        del q_a, q_b
    found, means = float(rho.mean()), null.mean(1)
    return Canonical(
        directions=kept,
        variance=(sides[0].share(kept[0]), sides[1].share(kept[1])),
        correlations=rho.tolist(),
        mean=found,
        area=area_under(rho),
        pwcca=(projection_weighted(sides[0], u, rho), projection_weighted(sides[1], v, rho)),
        null_mean=float(means.mean()) if permutations else math.nan,
        null_95=float(np.quantile(means, 0.95)) if permutations else math.nan,
        null_spectrum=np.quantile(null, 0.95, axis=0).tolist() if permutations else [],
        p_value=float((1 + np.sum(means >= found - 1e-12)) / (1 + len(means))) if permutations else math.nan,
        permutations=permutations,
        seed=seed,
    )


def _cosines(first: Rows, second: Rows, sides: tuple[Principal, Principal]) -> tuple[Array, float]:
    """The cosine of each prompt's two shifts where neither is zero, and that of the mean shifts."""
    if first.shape[1] != second.shape[1]:
        return np.zeros(0), math.nan
    found = []
    step = max(1, len(next(chunked(first))))
    for start in range(0, len(first), step):
        x = np.asarray(first[start : start + step], dtype=np.float64)
        y = np.asarray(second[start : start + step], dtype=np.float64)
        norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
        found.append(np.sum(x * y, 1)[norms > 0] / norms[norms > 0])
    mean_a, mean_b = sides[0].mean, sides[1].mean
    norm = float(np.linalg.norm(mean_a) * np.linalg.norm(mean_b))
    return np.concatenate(found), float(mean_a @ mean_b) / norm if norm else math.nan


def mean_known(values: Sequence[float]) -> float:
    """The mean of those that are numbers; NaN if none is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
