"""How a layer holds its tangents: one matrix per leaf module, and the factors of ΔW = τ or ΔW = B·A."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def product(self) -> Tensor:
        """λ·ΔW (out, in), formed if it is low rank."""
        if self.dense is not None:
            return self.dense
        assert self.b is not None and self.a is not None
        return self.b @ self.a
