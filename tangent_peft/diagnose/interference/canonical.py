"""Canonical correlations and linear CKA of two sets of rows, in float64. Knows arrays, and nothing of models.

A (N, d) and B (N, d'), one row per prompt, are centred. Each is reduced to its leading principal directions and scaled
to an orthonormal basis Q = A V Σ⁻¹ (N, k); the singular values of Q_Aᵀ Q_B are the canonical correlations ρ₁ ≥ ρ₂ ≥ …
(Hotelling 1936; SVCCA, arXiv 1706.05806). The reduction is not a refinement: two random sets of rows have canonical
correlations of exactly 1 as soon as k + k' > N − 1.

The rows may lie in a file (`Spool.array`). They are read in chunks, so memory is of the order d², whatever N is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from tangent_peft.diagnose.spool import Spool


Array: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.floating]

CHUNK_ENTRIES = 2**21  # entries of the rows that are held in float64 at a time
ROWS_PER_DIRECTION = 5  # CCA needs several rows for each direction that it may turn
LEAST_ROWS = 2 * ROWS_PER_DIRECTION  # for two directions


@dataclass(frozen=True)
class Principal:
    """The principal directions of centred rows.

    Attributes:
        mean: of the rows (d,).
        values: the singular values of the centred rows that exceed rounding, falling (rank,).
        directions: right singular vectors (rank, d).
        count: N.
        mean_share: N ‖mean‖² / Σ ‖row‖², the energy that centring takes away; NaN for rows that are all zero.
    """

    mean: Array
    values: Array
    directions: Array
    count: int
    mean_share: float

    def kept(self, energy: float, limit: int) -> int:
        """How many directions it takes for a share of the variance, at most `limit` and the rank."""
        shares = np.cumsum(self.values**2) / np.sum(self.values**2) if len(self.values) else np.zeros(0)
        return min(limit, len(shares), int(np.searchsorted(shares, energy * (1 - 1e-12))) + 1)

    def share(self, k: int) -> float:
        """Share of the variance in the leading k directions; NaN without variance."""
        total = float(np.sum(self.values**2))
        return float(np.sum(self.values[:k] ** 2)) / total if total else math.nan


def chunked(rows: Rows) -> Iterator[Array]:
    """The rows in float64, some at a time."""
    size = max(1, CHUNK_ENTRIES // max(1, rows.shape[1]))
    for start in range(0, len(rows), size):
        yield np.asarray(rows[start : start + size], dtype=np.float64)


def check_rows(a: Rows, b: Rows) -> None:
    """Refuses what are not two sets of rows about the same prompts.

    Raises:
        ValueError: for other than two dimensions, different N, no rows, or an entry that is not finite.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) != len(b) or not len(a):
        raise ValueError(
            f"Two sets of rows (N, d) about the same N ≥ 1 prompts are compared; found the shapes {a.shape} and "
            f"{b.shape}."
        )
    for name, rows in (("first", a), ("second", b)):
        if not all(np.isfinite(part).all() for part in chunked(rows)):
            raise ValueError(f"The {name} set of rows has an entry that is not finite. Look for axes that overflow.")


def principal(rows: Rows) -> Principal:
    """The principal directions of rows (N, d): SVD of the R factor of a QR of the centred rows, taken chunk by chunk.

    Directions are dropped whose singular value is below the rounding of the rows' own dtype, relative to the rows
    *before* centring: if all rows are the same, nothing is left.
    """
    count = len(rows)
    mean = sum(part.sum(0) for part in chunked(rows)) / count
    triangle, energy = np.zeros((0, rows.shape[1])), 0.0
    for part in chunked(rows):
        energy += float(np.sum(part**2))
        triangle = np.asarray(np.linalg.qr(np.concatenate([triangle, part - mean]), mode="r"))
    _, values, directions = np.linalg.svd(triangle, full_matrices=False)
    rank = int(np.sum(values > _rounding(rows) * math.sqrt(energy))) if energy else 0
    share = count * float(mean @ mean) / energy if energy else math.nan
    return Principal(mean, values[:rank], directions[:rank], count, share)


def whitened(rows: Rows, of: Principal, k: int, into: Spool) -> Rows:
    """The rows in their k leading directions, scaled to orthonormal columns: Q (N, k), in `into`."""
    for part in chunked(rows):
        into.append(torch.from_numpy((part - of.mean) @ of.directions[:k].T / of.values[:k]))
    return into.array()


def correlations(q_a: Rows, q_b: Rows, order: NDArray[np.int64] | None = None) -> tuple[Array, Array, Array]:
    """ρ, falling, and the canonical directions of two orthonormal bases (N, k) and (N, k').

    Args:
        q_a: the first.
        q_b: the second.
        order: which row of `q_b` is set against each of `q_a`; `None`: the one of the same number.

    Returns:
        U (k, m), ρ (m,) in [0, 1], and V (k', m), with m = min(k, k').
    """
    product = np.zeros((q_a.shape[1], q_b.shape[1]))
    size = max(1, CHUNK_ENTRIES // max(1, *product.shape))
    for start in range(0, len(q_a), size):
        where = slice(start, start + size)
        other = q_b[where] if order is None else q_b[order[where]]
        product += np.asarray(q_a[where], dtype=np.float64).T @ np.asarray(other, dtype=np.float64)
    u, rho, vh = np.linalg.svd(product, full_matrices=False)
    return u, np.clip(rho, 0.0, 1.0), vh.T


def permuted_correlations(q_a: Rows, q_b: Rows, permutations: int, seed: int) -> Array:
    """ρ (n, m) of n random pairings of the rows: what there is to find where nothing is shared."""
    generator = np.random.default_rng(seed)
    found = np.zeros((permutations, min(q_a.shape[1], q_b.shape[1])))
    for row in found:
        row[:] = correlations(q_a, q_b, generator.permutation(len(q_b)))[1]
    return found


def projection_weighted(of: Principal, directions: Array, rho: Array) -> float:
    """PWCCA (arXiv 1806.05759): the mean of ρ, each weighted by how much of the rows its variate accounts for.

    The weight of variate hᵢ = Q uᵢ is Σⱼ |⟨hᵢ, xⱼ⟩| over the columns xⱼ of the centred rows, which is ‖V Σ uᵢ‖₁.

    Args:
        of: the rows that give the weights.
        directions: their canonical directions uᵢ (k, m).
        rho: (m,).
    """
    k = len(directions)
    weights = np.abs((of.directions[:k].T * of.values[:k]) @ directions).sum(0)
    return float(weights @ rho / weights.sum())


def area_under(rho: Array) -> float:
    """∫ρ over the spectrum laid out on [0, 1], by trapezoids: near ρ₁ for a flat spectrum, small if it decays fast.

    NaN for a single ρ, which has no decay.
    """
    return float(np.mean((rho[1:] + rho[:-1]) / 2)) if len(rho) > 1 else math.nan


def linear_cka(a: Rows, b: Rows) -> tuple[float, float]:
    """Linear CKA of two sets of rows (Kornblith et al., arXiv 1905.00414), as it was published and debiased.

    Published: ‖AᵀB‖² / (‖AᵀA‖ ‖BᵀB‖) of the centred rows. With fewer rows than dimensions it is near 1 for rows that
    have nothing in common. Debiased: with the unbiased estimator of HSIC (Song et al., JMLR 2012, eq. 5; Nguyen et
    al., arXiv 2010.15327) in place of each of the three terms; about 0 for independent rows at any N, and at times a
    little below. On centred rows, with kᵢ = ‖aᵢ‖² and lᵢ = ‖bᵢ‖², that estimator is, up to a factor that cancels,

        ‖AᵀB‖² − n/(n − 2) Σ kᵢ lᵢ + (Σ kᵢ)(Σ lᵢ) / ((n − 1)(n − 2)).

    Args:
        a: rows (N, d).
        b: rows (N, d') about the same prompts.

    Returns:
        Both; NaN where rows do not vary, and the second one below 4 rows.

    Raises:
        ValueError: if the shapes do not fit, or an entry is not finite.
    """
    check_rows(a, b)
    if not (_vary(a) and _vary(b)):
        return math.nan, math.nan
    terms = [_hsic(a, b), _hsic(a, a), _hsic(b, b)]
    return _ratio(*(term[0] for term in terms)), _ratio(*(term[1] for term in terms))


def _vary(rows: Rows) -> bool:
    """Whether the rows differ from their mean by more than their own rounding."""
    mean = sum(part.sum(0) for part in chunked(rows)) / len(rows)
    spread = sum(float(np.sum((part - mean) ** 2)) for part in chunked(rows))
    energy = sum(float(np.sum(part**2)) for part in chunked(rows))
    return math.sqrt(spread) > _rounding(rows) * math.sqrt(energy)


def _rounding(rows: Rows) -> float:
    """Relative to √Σ‖row‖², what rounding may leave in a direction: errors add up like random ones."""
    return 10.0 * math.sqrt(max(rows.shape)) * float(np.finfo(rows.dtype).eps)


def _hsic(a: Rows, b: Rows) -> tuple[float, float]:
    n = len(a)
    mean_a, mean_b = (sum(part.sum(0) for part in chunked(rows)) / n for rows in (a, b))
    product = np.zeros((a.shape[1], b.shape[1]))
    sums = np.zeros(3)
    size = max(1, CHUNK_ENTRIES // max(a.shape[1], b.shape[1]))
    for start in range(0, n, size):
        x = np.asarray(a[start : start + size], dtype=np.float64) - mean_a
        y = np.asarray(b[start : start + size], dtype=np.float64) - mean_b
        product += x.T @ y
        k, l = np.sum(x**2, 1), np.sum(y**2, 1)  # noqa: E741
        sums += [k @ l, k.sum(), l.sum()]
    biased = float(np.sum(product**2))
    both, first, second = sums.tolist()
    if n < 4:
        return biased, math.nan
    return biased, biased - n / (n - 2) * both + first * second / ((n - 1) * (n - 2))


def _ratio(both: float, first: float, second: float) -> float:
    return both / math.sqrt(first * second) if first > 0 and second > 0 else math.nan
