"""Gradients that conflict: their cosines, and PCGrad, which projects one off others (Yu et al. 2020, arXiv 2001.06782).

A gradient is a list of tensors, one per parameter. Inner products are summed in float64. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor


Gradient: TypeAlias = Sequence[Tensor]


def gradient_gram(gradients: Sequence[Gradient]) -> Tensor:
    """The inner products of K gradients, (K, K) in float64 on the CPU."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, first in enumerate(gradients):
        for j, second in enumerate(gradients[: i + 1]):
            pairs = zip(first, second, strict=True)
            gram[i, j] = gram[j, i] = sum(float(a.double().flatten() @ b.double().flatten()) for a, b in pairs)
    return gram


def gram_cosine(gram: Tensor, first: int, second: int) -> float:
    """The cosine of two gradients; NaN where one of them is zero or not finite."""
    return float(gram[first, second] / (gram[first, first] * gram[second, second]).sqrt())


def pcgrad_coefficients(gram: Tensor, order: Sequence[int]) -> Tensor:
    """What PCGrad makes of gradient 0: g₀ + Σ cⱼ gⱼ (algorithm 1).

    One gⱼ after the other: where the projected g₀ has a negative inner product with it, that component goes,
    g₀ ← g₀ − (g₀·gⱼ / ‖gⱼ‖²) gⱼ. With several the result depends on the order, which the paper draws at random.

    Args:
        gram: inner products (K, K) of the gradients.
        order: the other gradients, in the order they are taken in.

    Returns:
        Coefficients (K,) of the gradients, the first 1.
    """
    coefficients = torch.zeros(len(gram), dtype=gram.dtype)
    coefficients[0] = 1.0
    for j in order:
        inner = gram[j] @ coefficients
        if inner < 0:
            coefficients[j] -= inner / gram[j, j]
    return coefficients


@torch.no_grad()
def add_gradients(target: Gradient, others: Sequence[Gradient], coefficients: Sequence[float]) -> None:
    """Adds Σ cⱼ gⱼ to a gradient in place."""
    for gradient, coefficient in zip(others, coefficients, strict=True):
        if coefficient:
            for tensor, other in zip(target, gradient, strict=True):
                tensor.add_(other.to(tensor.dtype), alpha=coefficient)
