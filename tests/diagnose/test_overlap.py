"""Canonical correlations, CKA and cosines of two sets of rows: planted values, closed forms, other algorithms."""

from __future__ import annotations

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import scipy.linalg
import torch

from tangent_peft.diagnose.interference.canonical import linear_cka, principal
from tangent_peft.diagnose.interference.overlap import shift_overlap
from tangent_peft.diagnose.spool import Spool


PLANTED = np.array([0.9, 0.6, 0.3, 0.0])


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def planted(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of two sets whose canonical correlations are `PLANTED`, each set turned and stretched at random."""
    x, noise = normal(seed, count, 4), normal(seed + 1, count, 4)
    y = PLANTED * x + np.sqrt(1 - PLANTED**2) * noise
    return x @ normal(seed + 2, 4, 6) + 3.0, y @ normal(seed + 3, 4, 5) - 1.0


def by_eigenvalues(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CCA as the generalized symmetric eigenproblem of the covariances (Hotelling 1936): eigenvalues ±ρ."""
    a, b = a - a.mean(0), b - b.mean(0)
    p, q = a.shape[1], b.shape[1]
    joint = np.block([[np.zeros((p, p)), a.T @ b], [b.T @ a, np.zeros((q, q))]])
    scale = scipy.linalg.block_diag(a.T @ a, b.T @ b)
    return np.sort(scipy.linalg.eigh(joint, scale, eigvals_only=True))[::-1][: min(p, q)]


# ---- canonical correlations ----------------------------------------------------------------------------------------


def test_recovers_planted_correlations() -> None:
    found = shift_overlap(*planted(20_000), energy=1.0, permutations=20)
    assert found.cca.directions == (4, 4)  # the rank of each set, of 6 and 5 dimensions
    assert found.cca.correlations == pytest.approx(PLANTED.tolist(), abs=0.02)
    assert found.cca.mean == pytest.approx(PLANTED.mean(), abs=0.01)
    assert found.cca.null_95 < 0.02 and found.cca.p_value == pytest.approx(1 / 21)
    assert all(low < 0.05 for low in found.cca.null_spectrum)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_generalized_eigenproblem(seed: int) -> None:
    a = normal(seed, 80, 5)
    b = np.concatenate([a[:, :2] + normal(seed + 10, 80, 2), normal(seed + 20, 80, 2)], 1)
    found = shift_overlap(a, b, energy=1.0, permutations=0).cca
    assert found.correlations == pytest.approx(by_eigenvalues(a, b).tolist(), abs=1e-6)
    assert math.isnan(found.p_value) and found.null_spectrum == []


def test_reduces_to_a_fifth_of_the_prompts_and_says_so() -> None:
    a, b = normal(0, 40, 30), normal(1, 40, 30)
    found = shift_overlap(a, b, permutations=50, energy=1.0)
    assert found.cca.directions == (8, 8) and found.prompts == 40 and found.size == 30
    a0, b0 = a - a.mean(0), b - b.mean(0)
    reduced = [x @ np.linalg.svd(x, full_matrices=False)[2][:8].T for x in (a0, b0)]
    assert found.cca.correlations == pytest.approx(by_eigenvalues(*reduced).tolist(), abs=1e-6)
    s = np.linalg.svd(a0, compute_uv=False)
    assert found.cca.variance[0] == pytest.approx(np.sum(s[:8] ** 2) / np.sum(s**2))
    assert shift_overlap(a, b, permutations=5, components=3).cca.directions == (3, 3)


def test_energy_leaves_out_faint_directions() -> None:
    a = normal(0, 100, 4) * [10.0, 5.0, 0.1, 0.1]
    assert shift_overlap(a, a, permutations=5).cca.directions == (2, 2)
    assert shift_overlap(a, a, permutations=5, energy=1.0).cca.directions == (4, 4)


def test_does_not_change_when_a_set_is_turned_and_scaled() -> None:
    a, b = planted(200)
    turn = np.linalg.qr(normal(9, 6, 6))[0]
    one, other = shift_overlap(a, b, permutations=5), shift_overlap(7.0 * a @ turn, b, permutations=5)
    assert one.cca.correlations == pytest.approx(other.cca.correlations, abs=1e-6)
    assert one.cka == pytest.approx(other.cka) and one.cka_debiased == pytest.approx(other.cka_debiased)


def test_a_set_with_itself() -> None:
    a = normal(0, 60, 5)
    found = shift_overlap(a, 2.0 * a, permutations=19)
    assert found.cca.correlations == pytest.approx([1.0] * 5, abs=1e-6)
    assert found.cca.mean == pytest.approx(1.0) == found.cca.area
    assert found.cca.pwcca == pytest.approx((1.0, 1.0))
    assert (found.cosine, found.cosine_of_means) == pytest.approx((1.0, 1.0))
    assert (found.cka, found.cka_debiased) == pytest.approx((1.0, 1.0))
    assert found.cca.p_value == pytest.approx(1 / 20)


def test_weights_of_pwcca_are_the_inner_products_with_the_columns() -> None:
    a, b = planted(300)
    a, b = a - a.mean(0), b - b.mean(0)
    found = shift_overlap(a, b, energy=1.0, permutations=0).cca
    q = scipy.linalg.orth(a)
    u, rho, _ = np.linalg.svd(q.T @ scipy.linalg.orth(b), full_matrices=False)
    weights = np.abs((q @ u).T @ a).sum(1)
    assert found.pwcca[0] == pytest.approx(float(weights @ rho / weights.sum()), abs=1e-6)


def test_area_of_a_spectrum_written_out() -> None:
    a, b = planted(300)
    rho = shift_overlap(a, b, energy=1.0, permutations=0).cca
    assert rho.area == pytest.approx(float(np.trapezoid(rho.correlations, np.linspace(0, 1, 4))))


def test_independent_rows_have_p_values_spread_over_the_unit_interval() -> None:
    p = [shift_overlap(normal(s, 30, 12), normal(1000 + s, 30, 12), permutations=39).cca.p_value for s in range(60)]
    assert 0.38 < np.mean(p) < 0.65
    assert np.mean(np.array(p) <= 0.1) < 0.25 and np.max(p) > 0.8


def test_a_planted_dependence_is_told_from_chance_and_the_seed_repeats() -> None:
    shared = normal(0, 50, 2)
    a = np.concatenate([shared, normal(1, 50, 8)], 1)
    b = np.concatenate([shared, normal(2, 50, 8)], 1)
    found = shift_overlap(a, b, permutations=99, seed=3)
    assert found.cca.p_value == pytest.approx(0.01) and found.cca.mean > found.cca.null_95 > found.cca.null_mean
    assert found == shift_overlap(a, b, permutations=99, seed=3)
    assert found.cca.null_mean != shift_overlap(a, b, permutations=99, seed=4).cca.null_mean


# ---- what can not be had -------------------------------------------------------------------------------------------


def test_too_few_prompts_have_cosines_and_no_cca() -> None:
    found = shift_overlap(normal(0, 9, 4), normal(1, 9, 4))
    assert math.isnan(found.cca.mean) and math.isnan(found.cca.p_value) and found.cca.correlations == []
    assert "9 prompts are too few" in found.cca.reason and math.isfinite(found.cosine)


def test_shifts_that_are_zero_or_do_not_vary() -> None:
    a = normal(0, 40, 6)
    zero = shift_overlap(a, np.zeros((40, 6)))
    assert zero.cca.reason == "the second shift is zero for every prompt"
    assert all(math.isnan(x) for x in (zero.cca.mean, zero.cosine, zero.cosine_of_means, zero.cka, zero.cka_debiased))
    constant = np.tile(normal(1, 6), (40, 1)).astype(np.float32)
    same = shift_overlap(constant, a.astype(np.float32))
    assert same.cca.reason == "the first shift is the same for every prompt"
    assert math.isnan(same.cka) and math.isfinite(same.cosine) and same.mean_share[0] == pytest.approx(1.0)


def test_a_shift_of_rank_one_has_one_correlation_and_no_decay() -> None:
    a = normal(0, 60, 1) @ normal(1, 1, 8)
    found = shift_overlap(a, normal(2, 60, 8), permutations=10).cca
    assert found.directions[0] == 1 and len(found.correlations) == 1 and math.isnan(found.area)


def test_faint_directions_of_many_rows_are_not_taken_for_rounding() -> None:
    rows = (normal(0, 60_000, 3) * [1.0, 1.0, 1e-3]).astype(np.float32)
    assert len(principal(rows).values) == 3
    assert len(principal(rows @ np.diag([1.0, 1.0, 0.0]).astype(np.float32)).values) == 2


def test_refuses_settings_that_say_nothing() -> None:
    a = normal(0, 20, 6)
    with pytest.raises(ValueError, match="components=5 directions of 20 prompts"):
        shift_overlap(a, a, components=5)
    with pytest.raises(ValueError, match="energy=0"):
        shift_overlap(a, a, energy=0.0)
    with pytest.raises(ValueError, match="permutations=-1"):
        shift_overlap(a, a, permutations=-1)
    with pytest.raises(ValueError, match=r"\(20, 6\) and \(19, 6\)"):
        shift_overlap(a, a[1:])
    with pytest.raises(ValueError, match="second set of rows"):
        shift_overlap(a, np.where(np.eye(20, 6) > 0, np.nan, a))


# ---- CKA -----------------------------------------------------------------------------------------------------------


def hsic_in_a_loop(a: np.ndarray, b: np.ndarray) -> float:
    """The unbiased HSIC from its definition over sets of four different rows (Song et al. 2012, eq. 4), summed out."""
    k, l = a @ a.T, b @ b.T  # noqa: E741
    n, total = len(a), 0.0
    for i, j, q, r in itertools.permutations(range(n), 4):
        total += k[i, j] * (l[i, j] + l[q, r] - 2 * l[i, q])
    return total / math.perm(n, 4)


def test_debiased_cka_is_that_of_the_definition() -> None:
    a, b = normal(0, 9, 3) + 2.0, normal(1, 9, 4) - 1.0
    expected = hsic_in_a_loop(a, b) / math.sqrt(hsic_in_a_loop(a, a) * hsic_in_a_loop(b, b))
    assert linear_cka(a, b)[1] == pytest.approx(expected, rel=1e-9)


def test_cka_in_closed_form() -> None:
    x, y = normal(0, 50, 1), normal(1, 50, 1)
    assert linear_cka(x, y)[0] == pytest.approx(np.corrcoef(x[:, 0], y[:, 0])[0, 1] ** 2)
    basis = np.linalg.qr(np.concatenate([np.ones((50, 1)), normal(2, 50, 8)], 1))[0][:, 1:]
    assert linear_cka(basis[:, :4], basis[:, 4:])[0] == pytest.approx(0.0, abs=1e-12)
    assert linear_cka(basis[:, :4], basis[:, 2:6])[0] == pytest.approx(2 / 4)  # two columns of four in common


def test_bias_of_cka_where_rows_are_fewer_than_dimensions() -> None:
    found = [linear_cka(normal(s, 30, 300), normal(500 + s, 30, 300)) for s in range(20)]
    biased, debiased = np.mean(found, 0)
    assert biased > 0.85 and abs(debiased) < 0.05


# ---- cosines, means, files -----------------------------------------------------------------------------------------


def test_cosines_prompt_by_prompt() -> None:
    a, b = normal(0, 30, 5) + 1.0, normal(1, 30, 5)
    b[3] = 0.0
    cosines = [float(x @ y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True) if y.any()]
    found = shift_overlap(a, b, permutations=0)
    assert found.cosine == pytest.approx(np.mean(cosines))
    assert found.cosine_quantiles == pytest.approx(np.quantile(cosines, [0.05, 0.5, 0.95]))
    means = a.mean(0), b.mean(0)
    assert found.cosine_of_means == pytest.approx(
        float(means[0] @ means[1]) / np.linalg.norm(means[0]) / np.linalg.norm(means[1])
    )
    assert found.mean_share[0] == pytest.approx(30 * float(means[0] @ means[0]) / float(np.sum(a**2)))


def test_principal_directions_are_those_of_the_svd_in_any_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    a = normal(0, 50, 7)
    expected = np.linalg.svd(a - a.mean(0), compute_uv=False)
    monkeypatch.setattr("tangent_peft.diagnose.interference.canonical.CHUNK_ENTRIES", 30)
    found = principal(a)
    assert found.values == pytest.approx(expected) and found.count == 50
    assert found.directions @ found.directions.T == pytest.approx(np.eye(7), abs=1e-12)
    whole = shift_overlap(a, normal(1, 50, 7), permutations=3)
    monkeypatch.undo()
    again = shift_overlap(a, normal(1, 50, 7), permutations=3)
    assert whole.cca.correlations == pytest.approx(again.cca.correlations, abs=1e-6)
    assert whole.cka_debiased == pytest.approx(again.cka_debiased)


def test_rows_in_a_file_cost_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tangent_peft.diagnose.interference.canonical.CHUNK_ENTRIES", 2**12)
    d, count = 64, 10_000
    with Spool((d,)) as one, Spool((d,)) as other:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count // 1000):
            rows = torch.randn(1000, d, generator=generator)
            one.append(rows)
            other.append(rows.flip(1) + 2.0)
        tracemalloc.start()
        found = shift_overlap(one.array(), other.array(), permutations=1)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert found.cca.correlations == pytest.approx([1.0] * len(found.cca.correlations), abs=1e-5)
    assert peak < count * d * 8 / 4, "a quarter of one set of rows in float64"
