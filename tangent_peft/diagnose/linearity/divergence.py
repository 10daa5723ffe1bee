"""Divergences of next-token distributions from their logits, right also where they are tiny, in float32.

log p − log q, summed against p, loses a KL of 1e-6 in the rounding of the two normalizers. Here every term is ≥ 0 and
of second order in d = log p − log q, so that an error of d that all entries share is of second order as well:

    KL(p ‖ q)   = Σ p ψ(d),        ψ(d) = e⁻ᵈ − 1 + d                        ≈ d²/2   (Σ p e⁻ᵈ = Σ q = 1)
    JSD(p, q)   = Σ m g(d),        g(d) = ½ [d t + log(1 − t²)], t = tanh(d/2)  ≈ d²/8

with m = (p + q)/2, p = m (1 + t), q = m (1 − t). d is taken from the difference of the logits themselves. All in nats.
Letters: N tokens, V vocabulary. Knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


TILE_ENTRIES = 2**20  # of the logits that are worked on at a time: 4 MiB in float32, a few times over
SERIES = {torch.float32: 0.1, torch.float64: 0.01}  # |d| below which ψ is taken from its series: exact to rounding
FAR = 2.0  # |d| from which g is taken in its form for large ones


def token_slices(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of N tokens, so many that their logits are a tile."""
    size = max(1, TILE_ENTRIES // max(1, vocabulary))
    return (slice(start, start + size) for start in range(0, tokens, size))


def kl(first: Tensor, second: Tensor) -> Tensor:
    """KL(p ‖ q) of each token, p the softmax of `first` and q that of `second`.

    Args:
        first: logits (N, V), normalized or not; of less than float32 they are taken as float32.
        second: likewise.

    Returns:
        (N,) in float64, nats, at least 0; NaN where logits are not finite.
    """
    parts = [_kl(_single(first[at]), _single(second[at])) for at in token_slices(*first.shape)]
    return torch.cat(parts) if parts else first.new_zeros(0, dtype=torch.float64)


def jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """JSD(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m), m = (p + q)/2, of each token (Lin, IEEE Trans. Inf. Theory 1991).

    Args:
        first: logits (N, V) of p, normalized or not; of less than float32 they are taken as float32.
        second: those of q.

    Returns:
        (N,) in float64, nats, from 0 to log 2; NaN where logits are not finite.
    """
    parts = [_jensen_shannon(_single(first[at]), _single(second[at])) for at in token_slices(*first.shape)]
    return torch.cat(parts) if parts else first.new_zeros(0, dtype=torch.float64)


def _single(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _compared(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """d = log p − log q (n, V), and the log-normalizers (n, 1) of both."""
    normalizers = [logits.logsumexp(-1, keepdim=True) for logits in (first, second)]
    difference = (first - second).sub_(normalizers[0] - normalizers[1])
    return difference, normalizers[0], normalizers[1]


def _kl(first: Tensor, second: Tensor) -> Tensor:
    d, first_normalizer, second_normalizer = _compared(first, second)
    p, q = (first - first_normalizer).exp_(), (second - second_normalizer).exp_()
    exact = (q - p).addcmul_(p, d)
    series = (((d / 720 - 1 / 120).mul_(d).add_(1 / 24)).mul_(d).sub_(1 / 6)).mul_(d).add_(0.5).mul_(d).mul_(d).mul_(p)
    return torch.where(d.abs() < SERIES[d.dtype], series, exact).sum(-1, dtype=torch.float64)


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    d, first_normalizer, second_normalizer = _compared(first, second)
    m = (first - first_normalizer).exp_().add_((second - second_normalizer).exp_())  # 2 m
    t = (d / 2).tanh_()
    # With e = e^−|d| the bracket is 2 log 2 − 2 log(1 + e) − 2 |d| e/(1 + e): the form where t rounds to 1.
    size = d.abs()
    e = (-size).exp_()
    far = 2 * math.log(2) - 2 * e.log1p() - 2 * size * e / (1 + e)
    near = t.square().neg_().log1p_().add_(t.mul_(d))
    change = torch.where(size < FAR, near, far)
    return change.mul_(m).sum(-1, dtype=torch.float64) / 4
