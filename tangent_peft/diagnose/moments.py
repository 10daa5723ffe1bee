"""Mean and second moment of vectors that come batch by batch, and what a list of singular values says.

Of N vectors x (D,), the rows of X (N, D), only Σ x and XᵀX (D, D) are kept, in float64, so memory does not depend on N.
The singular values of X are the roots of the eigenvalues of XᵀX; those below `RESOLUTION` of the largest are lost in
its rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


RESOLUTION = 1e-7  # singular values from a Gram matrix in float64: the root of its 2e-16, with a margin


class Moments:
    """The moments of vectors of one size.

    Args:
        size: D.
    """

    def __init__(self, size: int) -> None:
        self.count = 0
        self._sum = torch.zeros(size, dtype=torch.float64)
        self._gram = torch.zeros(size, size, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Takes in some vectors (n, D).

        Raises:
            ValueError: if an entry is not finite.
        """
        x = x.detach().to("cpu", torch.float64)
        if not bool(x.isfinite().all()):
            raise ValueError("An activation is not finite. Look for values in the model, or its axes, that overflow.")
        self.count += len(x)
        self._sum += x.sum(0)
        self._gram.addmm_(x.T, x)

    @property
    def mean(self) -> Tensor:
        """Σ x / N (D,) in float64; NaN before the first vector."""
        return self._sum / self.count if self.count else torch.full_like(self._sum, math.nan)

    def second(self, centred: bool = False) -> Tensor:
        """XᵀX (D, D) in float64, with `centred` of the deviations from the mean."""
        if not centred or not self.count:
            return self._gram.clone()
        return self._gram - torch.outer(self._sum, self._sum) / self.count

    def principal(self, centred: bool = False) -> tuple[Tensor, Tensor]:
        """Singular values of X (K,), falling, and its right singular vectors (D, K); K = min(N, D)."""
        values, vectors = torch.linalg.eigh(self.second(centred))
        rank = min(self.count, len(values))
        return values.flip(0)[:rank].clamp(min=0).sqrt(), vectors.flip(1)[:, :rank]

    def singular_values(self, centred: bool = False) -> Tensor:
        """Singular values of X (K,), falling; K = min(N, D)."""
        return self.principal(centred)[0]


@dataclass(frozen=True)
class Spectrum:
    """What a list of singular values σ₁ ≥ σ₂ ≥ … says; all NaN if they are all 0.

    Attributes:
        values: σ, falling.
        power: p_k = σ_k^power / Σ σ^power is what the entropy is of; 2: shares of the energy, 1: of the sum.
        ratio: σ₂/σ₁; 0 for a single value.
        top_energy: σ₁² / Σ σ².
        entropy: −Σ p log p, in nats.
        normalized_entropy: the same divided by log of how many values there are; 0 for a single value.
        effective_rank: e to the entropy; between 1 and the number of values.
    """

    values: list[float]
    power: int
    ratio: float
    top_energy: float
    entropy: float
    normalized_entropy: float
    effective_rank: float

    @staticmethod
    def of(values: Tensor | Sequence[float], power: int = 2) -> Spectrum:
        """The spectrum of some singular values, in any order.

        Raises:
            ValueError: for none, negative ones or ones that are not finite, or a power other than 1 and 2.
        """
        sigma = torch.as_tensor(values, dtype=torch.float64).flatten().sort(descending=True).values
        if not len(sigma) or not bool(sigma.isfinite().all()) or bool((sigma < 0).any()):
            raise ValueError(f"Singular values are finite and not negative, at least one; found {sigma.tolist()[:5]}.")
        if power not in (1, 2):
            raise ValueError(f"`power` is {power}; it is 2 (shares of the energy) or 1 (shares of the sum).")
        if float(sigma[0]) == 0.0:
            return Spectrum(sigma.tolist(), power, *[math.nan] * 5)
        sigma_1 = sigma / sigma[0]
        shares = sigma_1**power / (sigma_1**power).sum()
        entropy = float(torch.special.entr(shares).sum())
        return Spectrum(
            sigma.tolist(),
            power,
            float(sigma_1[1]) if len(sigma) > 1 else 0.0,
            float(1 / sigma_1.square().sum()),
            entropy,
            entropy / math.log(len(sigma)) if len(sigma) > 1 else 0.0,
            math.exp(entropy),
        )

    def rank(self, epsilon: float) -> int:
        """How many values exceed `epsilon` · σ₁ (D-STEER's rank_ε, arXiv 2512.11838)."""
        return sum(value > epsilon * self.values[0] for value in self.values)
