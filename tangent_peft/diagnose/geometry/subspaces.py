"""Singular values of one ΔW, its leading directions, and the angles between two subspaces. Knows no model.

A product B·A is never formed: with Q R factors of B and Aᵀ its singular values are those of the small R_B R_Aᵀ. A dense
ΔW is decomposed through the Gram matrix of its smaller side in float64, which loses singular values below 1e-8 of the
largest: 1e-16 of the energy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tangent_peft.tuner.weights import DOUBLE_ENTRIES, TangentFactors


@dataclass(frozen=True)
class Directions:
    """The singular value decomposition of a ΔW (out, in), its leading directions only.

    Attributes:
        values: all its singular values (m,), falling, in float64; m is the rank it can have.
        left: orthonormal basis (out, k) of what it writes.
        right: orthonormal basis (in, k) of what it reads.
    """

    values: Tensor
    left: Tensor
    right: Tensor


def leading(factors: TangentFactors, energy: float, count: int | None = None) -> Directions:
    """Singular values and leading directions of a tangent.

    Args:
        factors: of one matrix, without a leading E.
        energy: take as many directions as hold this share of ‖ΔW‖²; none if it is zero.
        count: take so many instead, at most as many as are not zero.
    """
    if factors.dense is not None:
        return _of_dense(factors.dense, energy, count)
    assert factors.b is not None and factors.a is not None
    q_left, r_left = torch.linalg.qr(factors.b.double())
    q_right, r_right = torch.linalg.qr(factors.a.double().mT)
    u, values, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    k = _taken(values, energy, count)
    return Directions(values, q_left @ u[:, :k], q_right @ vh[:k].mT)


def _of_dense(dense: Tensor, energy: float, count: int | None) -> Directions:
    wide = dense.shape[0] < dense.shape[1]
    tall = dense.mT if wide else dense  # (m, n), m ≥ n
    gram = torch.zeros(tall.shape[1], tall.shape[1], dtype=torch.float64, device=dense.device)
    for part in _in_double(tall):
        gram.addmm_(part.mT, part)
    squares, vectors = torch.linalg.eigh(gram)
    values, right = squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
    right = right[:, : _taken(values, energy, count)]
    # ΔW V = U Σ: orthogonal up to rounding, and made so exactly.
    left = torch.linalg.qr(torch.cat([part @ right for part in _in_double(tall)]))[0]
    return Directions(values, right, left) if wide else Directions(values, left, right)


def _in_double(rows: Tensor) -> Iterator[Tensor]:
    for part in rows.split(max(1, DOUBLE_ENTRIES // rows.shape[1])):
        yield part.double()


def _taken(values: Tensor, energy: float, count: int | None) -> int:
    if not float(values[0]):
        return 0
    if count is not None:
        return min(count, int((values > 1e-7 * values[0]).sum()))
    return energy_rank(values, energy)


def energy_rank(values: Tensor, energy: float) -> int:
    """How many singular values, falling, hold a share `energy` of Σ σ²; 0 if all are zero."""
    shares = values.square().cumsum(0)
    if not float(shares[-1]):
        return 0
    return min(len(values), int((shares < energy * (1 - 1e-12) * shares[-1]).sum()) + 1)


@dataclass(frozen=True)
class Ranks:
    """How many directions a tangent has, by three measures; NaN where it is zero.

    Attributes:
        norm: ‖τ‖, the root of Σ σ².
        possible: how many singular values there can be.
        effective: e^H of the shares σ²/Σσ² (Roy & Vetterli 2007, of the energy).
        stable: Σ σ² / σ₁².
        energy: how many values hold the share of the energy that was asked for.
        top: σ₁² / Σ σ².
        values: the largest singular values, falling.
    """

    norm: float
    possible: int
    effective: float
    stable: float
    energy: int
    top: float
    values: list[float]

    @staticmethod
    def of(values: Tensor, energy: float, kept: int) -> Ranks:
        """Of some singular values (m,), in any order; `kept` of them stay in the result."""
        sigma = values.sort(descending=True).values
        total, squares = float(sigma.square().sum()), sigma.square()
        found = (0.0, len(sigma), math.nan, math.nan, 0, math.nan)
        if total:
            spread = math.exp(float(torch.special.entr(squares / total).sum()))
            stable = total / float(squares[0])
            found = (math.sqrt(total), len(sigma), spread, stable, energy_rank(sigma, energy), 1 / stable)
        return Ranks(*found, sigma[:kept].tolist())


@dataclass(frozen=True)
class Angles:
    """Two subspaces of one space of n dimensions.

    Attributes:
        dimensions: of each of them.
        angles: the smallest principal angles, in degrees, rising.
        overlap: mean cos² of all min(k, k') angles: 1 where one lies in the other, 0 where they are orthogonal.
        chance: the overlap of random subspaces of these dimensions, max(k, k') / n.
    """

    dimensions: tuple[int, int]
    angles: list[float]
    overlap: float
    chance: float

    @staticmethod
    def between(x: Tensor, y: Tensor, room: int, kept: int) -> Angles:
        """Of two orthonormal bases (n, k) and (n, k').

        Args:
            x: the first.
            y: the second.
            room: the dimensions in which they are free to turn: n, or fewer where both lie in a known subspace.
            kept: how many angles stay in the result.
        """
        dimensions = (x.shape[1], y.shape[1])
        if not min(dimensions):
            return Angles(dimensions, [], math.nan, math.nan)
        theta = principal_angles(x, y)
        overlap = float(theta.cos().square().mean())
        return Angles(dimensions, torch.rad2deg(theta[:kept]).tolist(), overlap, max(dimensions) / room)


def principal_angles(x: Tensor, y: Tensor) -> Tensor:
    """The principal angles (min(k, k'),) of two subspaces in radians, rising (Björck & Golub 1973).

    From the cosines where they are large and from the sines where they are small, or angles below 1e-8 would be lost
    (Knyazev & Argentati 2002).

    Args:
        x: orthonormal basis (n, k) in float64.
        y: orthonormal basis (n, k') in float64.
    """
    larger, smaller = (x, y) if x.shape[1] >= y.shape[1] else (y, x)
    product = larger.mT @ smaller
    cosines = torch.linalg.svdvals(product).clamp(max=1.0)
    sines = torch.linalg.svdvals(smaller - larger @ product).clamp(max=1.0).flip(0)
    return torch.where(cosines.square() < 0.5, cosines.acos(), sines.asin())


def by_matrix(factors: TangentFactors) -> Sequence[TangentFactors]:
    """One tangent for each of fused experts (E, …), and the tangent itself where there are none."""
    held = factors.dense if factors.dense is not None else factors.b
    assert held is not None
    if held.ndim == 2:
        return [factors]

    def part(x: Tensor | None, expert: int) -> Tensor | None:
        return x if x is None or x.ndim == 2 else x[expert]

    return [
        TangentFactors(part(factors.dense, expert), part(factors.b, expert), part(factors.a, expert))
        for expert in range(len(held))
    ]
