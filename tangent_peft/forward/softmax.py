"""The softmax of logits that are seen one part of the vocabulary at a time, and expectations under it.

With the running maximum m, each part adds to Σ e^{z−m}, Σ e^{2(z−m)} and Σ e^{z−m}·x for each x of interest; when m
grows, what was summed so far shrinks by e^{m−m'}. This file knows tensors only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class OnlineSoftmax:
    """Softmax of n rows of logits.

    Args:
        labels: the chosen entry of each row (n,).

    Attributes:
        top: largest logit so far (n,).
        of_label: at the label, the logit and then each of the other quantities (n,).
    """

    def __init__(self, labels: Tensor) -> None:
        self.labels = labels
        self.top: Tensor = torch.full(labels.shape, -math.inf, device=labels.device)
        self.of_label: list[Tensor] = []
        self._sums: list[Tensor] = []  # Σ e^{z−m}, Σ e^{2(z−m)}, then Σ e^{z−m}·x

    def add(self, start: int, logits: Tensor, *quantities: Tensor) -> None:
        """Takes in a part of the vocabulary.

        Args:
            start: index of its first entry.
            logits: z (n, v).
            *quantities: x (n, v), of which the expectation is wanted.
        """
        top = torch.maximum(self.top.to(logits.dtype), logits.amax(-1))
        weights = logits.sub(top[:, None]).exp_()
        shares = [weights.sum(-1), _dot(weights, weights), *(_dot(weights, x) for x in quantities)]
        if self._sums:
            shrink = (self.top - top).exp()
            factors = (shrink, shrink.square(), *[shrink] * len(quantities))
            shares = [a * factor + b for a, factor, b in zip(self._sums, factors, shares, strict=True)]
        self.top, self._sums = top, shares
        self._pick(start, logits, quantities)

    def _pick(self, start: int, logits: Tensor, quantities: tuple[Tensor, ...]) -> None:
        local = self.labels - start
        inside = (local >= 0) & (local < logits.shape[1])
        index = local.clamp(0, logits.shape[1] - 1)[:, None]
        found = [x.gather(1, index).squeeze(1) for x in (logits, *quantities)]
        before = self.of_label or [torch.zeros_like(x) for x in found]
        self.of_label = [torch.where(inside, new, old) for new, old in zip(found, before, strict=True)]

    def log_sum_exp(self) -> Tensor:
        """log Σ e^z (n,)."""
        return self.top + self._sums[0].log()

    def log_sum_of_squares(self) -> Tensor:
        """log Σ p² (n,)."""
        return self._sums[1].log() - 2 * self._sums[0].log()

    def means(self) -> list[Tensor]:
        """Σ p·x (n,) of each quantity."""
        return [x / self._sums[0] for x in self._sums[2:]]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ_v left·right (n,), without a product of size (n, v)."""
    return torch.bmm(left[:, None, :], right[:, :, None]).view(-1)
