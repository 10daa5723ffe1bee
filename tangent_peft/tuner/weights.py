"""How a layer holds its tangents: one matrix per leaf module, and the factors of ΔW = τ or ΔW = B·A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


DOUBLE_ENTRIES = 2**24  # entries of a dense ΔW that are held in float64 at a time


class TangentWeight(nn.Module):
    """A leaf that holds one matrix as `.weight`, so that sharding engines and TRL's copies treat it as a layer.

    Of fused experts it holds one matrix per expert (E, rows, columns).
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(*shape))

    def forward(self, x: Tensor) -> Tensor:
        """x (…, columns) → x·weightᵀ (…, rows), in the dtype of x."""
        return F.linear(x, self.weight.to(x.dtype))

    def extra_repr(self) -> str:
        """The shape, for the module's printout."""
        return ", ".join(str(size) for size in self.weight.shape)


def leaf_weight(holder: nn.ModuleDict, adapter_name: str) -> nn.Parameter:
    """The matrix of an adapter in one of a layer's dicts of `TangentWeight`."""
    leaf: Any = holder[adapter_name]
    return leaf.weight


@dataclass(frozen=True)
class TangentFactors:
    """One layer's tangent at its weight λ, dense or as a product; with a leading E for fused experts.

    Attributes:
        dense: λ·ΔW (out, in), or `None` for low rank.
        b: λ·B (out, r), or `None` for dense.
        a: A (r, in), or `None` for dense; without E where all experts share it.
    """

    dense: Tensor | None = None
    b: Tensor | None = None
    a: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        held = self.b if self.dense is None else self.dense
        assert held is not None
        return held.device

    def product(self) -> Tensor:
        """λ·ΔW (out, in), formed if it is low rank."""
        if self.dense is not None:
            return self.dense
        assert self.b is not None and self.a is not None
        return self.b @ self.a

    def inner(self, other: TangentFactors) -> Tensor:
        """⟨ΔW, ΔW'⟩ of two tangents of one layer, a scalar in float64; no product of factors is formed.

        With ∘ entry by entry and Σ over the entries:

        dense, dense           Σ ΔW ∘ ΔW'
        dense, low rank        Σ (ΔW A'ᵀ) ∘ B'
        low rank, low rank     Σ (BᵀB') ∘ (AA'ᵀ) = tr(BᵀB'·A'Aᵀ); with one A of orthonormal rows it is ⟨B, B'⟩

        The last line is computed as it stands for shared projections too: A is orthonormal only up to the rounding of
        the dtype in which it runs.
        """
        if self.dense is None and other.dense is not None:
            return other.inner(self)
        if self.dense is None:
            assert self.b is not None and self.a is not None and other.b is not None and other.a is not None
            return ((self.b.double().mT @ other.b.double()) * (self.a.double() @ other.a.double().mT)).sum()
        matching = other.b if other.dense is None else other.dense
        assert matching is not None
        rows = max(1, DOUBLE_ENTRIES * self.dense.shape[-2] // self.dense.numel())
        total = torch.zeros((), dtype=torch.float64, device=self.dense.device)
        for part, match in zip(self.dense.split(rows, dim=-2), matching.split(rows, dim=-2), strict=True):
            projected = part.double() if other.a is None else part.double() @ other.a.double().mT
            total += (projected * match.double()).sum()
        return total

    def square_norm(self) -> Tensor:
        """‖ΔW‖², the squared Frobenius norm, a scalar in float64."""
        return self.inner(self)
