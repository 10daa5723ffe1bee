"""Exponents planted in spectra and in matrices are found again; what has none is refused, with a reason."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from tangent_peft.diagnose.moments import Moments
from tangent_peft.diagnose.spinal.power_law import FitRule, fit_power_law, noise_exponent


def planted(sigma: np.ndarray, rows: int, columns: int) -> torch.Tensor:
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(sigma), generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(columns, len(sigma), generator=generator, dtype=torch.float64)).Q
    return (u * torch.from_numpy(sigma)) @ v.T


@pytest.mark.parametrize("alpha", [0.05, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(("rows", "columns"), [(120, 40), (40, 120)])
def test_a_planted_power_law_is_found_in_a_streamed_matrix(alpha: float, rows: int, columns: int) -> None:
    h = planted(3.0 * np.arange(1, 41) ** -alpha, rows, columns)
    moments = Moments(columns)
    for part in h.split(7):
        moments.add(part)
    found = fit_power_law(moments.singular_values())
    assert found.alpha == pytest.approx(alpha, abs=1e-6)
    assert found.r2 == pytest.approx(1.0, abs=1e-6) and found.reason == ""
    assert (found.points, found.window, found.rank) == (33, (4, 36), 40)


def test_agrees_with_scipy() -> None:
    rng = np.random.default_rng(0)
    sigma = np.sort(np.arange(1, 31) ** -0.7 * np.exp(0.05 * rng.standard_normal(30)))[::-1]
    k = np.arange(3, 28)  # ⌈0.1·30⌉ to ⌈0.9·30⌉, though 0.1·30 > 3 in floating point
    line = stats.linregress(np.log(k), np.log(sigma[k - 1]))
    found = fit_power_law(sigma)
    assert found.window == (3, 27) and found.points == len(k)
    assert found.alpha == pytest.approx(-line.slope, rel=1e-12)
    assert found.r2 == pytest.approx(line.rvalue**2, rel=1e-12)


def test_values_outside_of_the_window_do_not_matter() -> None:
    sigma = np.arange(1, 51) ** -1.0
    sigma[:4] *= 10
    sigma[46:] *= 0.5
    assert fit_power_law(sigma).alpha == pytest.approx(1.0, abs=1e-9)
    assert fit_power_law(sigma, FitRule(window=(0, 1))).alpha > 1.2


@pytest.mark.parametrize(
    ("sigma", "reason"),
    [
        (np.full(40, 2.0), "flat"),
        (1 + 1e-12 * np.arange(40), "flat"),
        (np.r_[np.full(35, 1.0), np.full(5, 0.1)], "R²"),
        (np.arange(1, 8) ** -1.0, "7 singular values"),
        (np.zeros(40), "0 singular values"),
        (np.zeros(0), "0 singular values"),
    ],
)
def test_no_number_where_there_is_no_power_law(sigma: np.ndarray, reason: str) -> None:
    found = fit_power_law(sigma)
    assert math.isnan(found.alpha) and reason in found.reason


def test_too_few_tokens_give_no_number() -> None:
    moments = Moments(40)
    moments.add(torch.randn(7, 40))
    found = fit_power_law(moments.singular_values())
    assert math.isnan(found.alpha) and found.points < 8 and "too few tokens" in found.reason


def test_rounding_is_left_out_and_counted() -> None:
    sigma = np.r_[np.arange(1, 31) ** -1.0, np.full(20, 1e-9)]
    found = fit_power_law(sigma)
    assert (found.rank, found.dropped) == (30, 20) and found.alpha == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(("tokens", "size"), [(1000, 64), (64, 1000), (300, 200), (200, 200)])
def test_noise_passes_for_a_power_law_and_its_exponent_is_known(tokens: int, size: int) -> None:
    rng = np.random.default_rng(0)
    found = [fit_power_law(np.linalg.svd(rng.standard_normal((tokens, size)), compute_uv=False)) for _ in range(4)]
    assert min(fit.r2 for fit in found) > 0.79
    expected = noise_exponent(tokens, size, FitRule(least_r2=0.7))
    mean = np.mean([fit.alpha for fit in found if not math.isnan(fit.alpha)])
    assert mean == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("options", [{"window": (0.9, 0.1)}, {"window": (0.1, 1.5)}, {"least_points": 2}])
def test_a_rule_that_makes_no_sense_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        FitRule(**options)  # type: ignore[arg-type]


def test_bad_values_are_refused() -> None:
    for bad in ([1.0, math.nan], [1.0, -0.1]):
        with pytest.raises(ValueError, match="finite and not negative"):
            fit_power_law(bad)
    with pytest.raises(ValueError, match="no singular values"):
        noise_exponent(0, 5)
