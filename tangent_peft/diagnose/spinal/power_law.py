"""The exponent of a falling spectrum, refused where there is none. Knows no model.

SPINAL (arXiv 2601.06238) calls α = −d log σ_k / d log k, on the tail of a layer's singular values, its *contraction*.
The paper's abstract does not give the window, nor when a fit is good enough; here it is ordinary least squares of
log σ_k on log k for k from ⌈0.1K⌉ to ⌈0.9K⌉, refused with fewer than 8 points or an R² below 0.8 (reconstruction).

R² alone does not tell a power law from noise: values that are sorted fall, and the singular values of a random matrix
pass with R² ≈ 0.9. `noise_exponent` is what the fit makes of such a matrix, the number an α has to be compared with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tangent_peft.diagnose.moments import RESOLUTION


FLAT = 1e-6  # a spectrum whose logarithms in the window differ by less has no exponent, only rounding
ROUNDING = 1e-9  # 0.1 · 30 is not 3 in floating point


@dataclass(frozen=True)
class FitRule:
    """How an exponent is fitted, and when it is refused.

    Attributes:
        window: first and last k as shares of K; both ends are rounded up.
        least_points: fewest singular values in the window.
        least_r2: smallest R².
        resolution: singular values below this share of the largest are rounding, and are left out.

    Raises:
        ValueError: for a window that is none, or fewer than 3 points.
    """

    window: tuple[float, float] = (0.1, 0.9)
    least_points: int = 8
    least_r2: float = 0.8
    resolution: float = RESOLUTION

    def __post_init__(self) -> None:
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"The window of the fit is {self.window}; give shares of the spectrum, 0 ≤ from < to ≤ 1.")
        if self.least_points < 3:
            raise ValueError(f"`least_points` is {self.least_points}; a fit that can fail needs at least 3.")


@dataclass(frozen=True)
class PowerLaw:
    """Result of `fit_power_law`: σ_k ∝ k^−α in a window.

    Attributes:
        alpha: α; NaN where the fit is refused.
        r2: R² of log σ on log k; NaN if there was nothing to fit.
        points: n, singular values in the window.
        window: first and last k, counted from 1.
        rank: K, singular values that are more than rounding.
        dropped: those that are not, and were left out.
        reason: why α is NaN; empty where it is a number.
    """

    alpha: float
    r2: float
    points: int
    window: tuple[int, int]
    rank: int
    dropped: int
    reason: str = ""


def fit_power_law(values: ArrayLike, rule: FitRule | None = None, scale: float = 0.0) -> PowerLaw:
    """Fits log σ_k = c − α log k on the tail of a spectrum (SPINAL, arXiv 2601.06238; window and bounds ours).

    Args:
        values: singular values σ, in any order.
        rule: window and bounds; the defaults of `FitRule`.
        scale: size of what was rounded, where that is larger than the largest value: of a matrix before its mean was
            taken out.

    Raises:
        ValueError: for values that are negative or not finite.
    """
    rule = rule or FitRule()
    sigma = np.sort(np.asarray(values, dtype=np.float64).ravel())[::-1]
    if not np.isfinite(sigma).all() or (sigma < 0).any():
        raise ValueError("Singular values are finite and not negative; these are not. Look at the matrix they are of.")
    kept = sigma[sigma > rule.resolution * max(sigma[0], scale)] if len(sigma) else sigma
    rank, dropped = len(kept), len(sigma) - len(kept)
    first, last = (max(1, math.ceil(share * rank - ROUNDING)) for share in rule.window)
    points = max(0, min(last, rank) - first + 1)
    held = (points, (first, last), rank, dropped)
    if points < rule.least_points:
        reason = f"{points} singular values in the window (K = {rank}), fewer than {rule.least_points}: too few tokens"
        return PowerLaw(math.nan, math.nan, *held, reason)
    x, y = np.log(np.arange(first, last + 1)), np.log(kept[first - 1 : last])
    if np.ptp(y) < FLAT:
        return PowerLaw(math.nan, math.nan, *held, "the spectrum is flat, so it has no exponent")
    slope, r2 = least_squares(x, y)
    if r2 < rule.least_r2:
        return PowerLaw(math.nan, r2, *held, f"R² = {r2:.2f}, below {rule.least_r2:g}: no power law")
    return PowerLaw(-slope, r2, *held)


def least_squares(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and R² of the straight line through points that are not all at one height."""
    dx, dy = x - x.mean(), y - y.mean()
    slope = float(dx @ dy / (dx @ dx))
    residual = dy - slope * dx
    return slope, 1.0 - float(residual @ residual / (dy @ dy))


def noise_exponent(tokens: int, size: int, rule: FitRule | None = None, grid: int = 20000) -> float:
    """α that the fit finds for independent Gaussian entries (tokens × size): the quantiles of Marchenko and Pastur.

    Args:
        tokens: rows N.
        size: columns D.
        rule: of the fit.
        grid: points on which the density is integrated.

    Returns:
        α of noise; NaN where the fit would be refused.

    Raises:
        ValueError: for an empty matrix.
    """
    if min(tokens, size) < 1:
        raise ValueError(f"A matrix of {tokens} × {size} has no singular values.")
    large, small = max(tokens, size), min(tokens, size)
    shape = small / large
    low, high = 1 - math.sqrt(shape), 1 + math.sqrt(shape)
    middle = np.linspace(low, high, grid + 1)[:-1] + (high - low) / (2 * grid)  # of σ / √large
    density = np.sqrt(np.maximum((high**2 - middle**2) * (middle**2 - low**2), 0)) / middle
    cumulative = np.cumsum(density) / density.sum()
    places = 1 - (np.arange(1, small + 1) - 0.5) / small
    return fit_power_law(np.interp(places, cumulative, middle), rule).alpha
