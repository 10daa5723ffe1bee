"""log Σ_v exp(z₀ + Σₖ λₖ żₖ) over a large vocabulary, at many λ at once.

At every λ a sum over the whole vocabulary costs V exponentials. Here the sum of a token is split in two over the box
that the λ span. The *head*, the few hundred entries that come closest to the largest one somewhere in the box, is
summed exactly at every λ. The *tail*, the rest, is a small and smooth part: its logarithm is interpolated in Chebyshev
polynomials from its values on a grid of Chebyshev–Lobatto points (Trefethen, Approximation Theory and Approximation
Practice, ch. 2–4). There e^{Σ λₖ żₖ} is a product over the axes, so that n² points of two axes cost 2n exponentials per
entry of the vocabulary and one matrix product.

The error in the log-sum-exp is that of the tail's logarithm times the tail's share of the sum. It is estimated per
token from how the coefficients fall off, and compared with the plain sum at some of the λ. Tokens that miss the
tolerance go to a finer grid, then to the two halves of the box, and in the end to the plain sum. Soft-capped logits,
which are no product over the axes, are always summed plainly. This file knows tensors only.
Letters: n tokens, K axes, V vocabulary, M mixes, H head entries, J points of the grid.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


#: Points per axis and entries of the head, in the order in which they are tried, by the number of axes that vary.
STAGES = {1: ((16, 256), (32, 512)), 2: ((16, 256), (24, 512)), 3: ((10, 256), (16, 512))}
BLOCK_CPU, BLOCK_ACCELERATOR = 2**19, 2**26  # entries worked on at a time
RANGE = 60.0  # largest |Σ λₖ żₖ| about its mean of which float32 holds all that counts
MIXES = 4096  # interpolated at a time
HEAD_SHARE = 8  # the vocabulary is at least so many heads, or nothing is gained
SLOWEST = 0.9  # ratio of coefficients four apart that is taken for convergence, not for rounding
MARGIN = 3.0  # the estimate is none by bounds: in trials the error was at most 1.3 times it
CHECKS = 3  # of the λ, where plain sum and interpolation are compared
_EXP, _PRODUCT, _PLAIN = 0.5, 0.04, 1.2  # relative costs per entry: of a factor, of a product, of a plain sum


@dataclass(frozen=True)
class Summed:
    """Result of `log_partition`.

    Attributes:
        values: log-sum-exp (M, n), in float64.
        plain: how many of the M·n values are plain sums.
        deviation: largest deviation from the plain sum where an accepted value was compared, in nats.
    """

    values: Tensor
    plain: int
    deviation: float


def log_partition(z: Tensor, mixes_MK: Tensor, tolerance: float, softcap: float | None = None) -> Summed:
    """The log-sum-exp of each token at each mix.

    Args:
        z: z₀, ż₁, …, ż_K (n, K+1, V), best with z₀ about its maximum and żₖ about their means.
        mixes_MK: λ, in float64.
        tolerance: largest error of a value, in nats; below what the dtype of `z` resolves all are plain sums.
        softcap: c, or `None`.
    """
    if softcap is not None:
        return Summed(plain_sums(z, mixes_MK, softcap), len(mixes_MK) * len(z), 0.0)
    return _refined(z, mixes_MK, tolerance)


def plain_sums(z: Tensor, mixes_MK: Tensor, softcap: float | None = None) -> Tensor:
    """log Σ_v e^z (M, n) in float64, as it is written."""
    tokens = []
    step = max(1, _block(z) // z.shape[2])
    for token in z:
        parts = []
        for weights in mixes_MK.to(z.dtype).split(step):
            logits = torch.addcmul(token[0], weights[:, :1], token[1])
            for axis in range(1, weights.shape[1]):
                logits.addcmul_(weights[:, axis, None], token[axis + 1])
            if softcap is not None:
                logits = logits.div_(softcap).tanh_().mul_(softcap)
            top = logits.amax(1, keepdim=True)
            parts.append(top[:, 0].double() + logits.sub_(top).exp_().sum(1).double().log())
        tokens.append(torch.cat(parts))
    return torch.stack(tokens, 1)


def _refined(z: Tensor, mixes: Tensor, tolerance: float) -> Summed:
    """Interpolated where it is worth it and good enough; the tokens left over on the halves of the box, or plainly."""
    values = torch.empty(len(mixes), len(z), dtype=torch.float64, device=z.device)
    left, deviation, plain = torch.arange(len(z), device=z.device), 0.0, 0
    box = _Box.around(mixes)
    stages = [stage for stage in STAGES.get(box.varying, ()) if _worthwhile(box.varying, stage, len(mixes), z.shape[2])]
    for points, entries in stages if len(mixes) <= MIXES else []:
        failed, grid = [], _Grid(box, points, mixes)
        for group in left.split(max(1, _block(z) // (4 * z.shape[2]))):
            found, bad, worst = _interpolated(z[group], mixes, grid, entries, tolerance)
            values[:, group] = found
            deviation = max(deviation, worst)
            failed.append(group[bad])
        left = torch.cat(failed)
        if not len(left):
            return Summed(values, plain, deviation)
    halves = box.halves(mixes, z[left]) if stages else []  # where finer is not worth it any more, there are no stages
    if halves and all(map(len, halves)):
        for half in halves:
            inner = _refined(z[left], mixes[half], tolerance)
            values[half[:, None], left] = inner.values
            plain, deviation = plain + inner.plain, max(deviation, inner.deviation)
    else:
        values[:, left] = plain_sums(z[left], mixes)
        plain = len(mixes) * len(left)
    return Summed(values, plain, deviation)


def _worthwhile(varying: int, stage: tuple[int, int], mixes: int, vocabulary: int) -> bool:
    points, entries = stage
    cost = varying * points * _EXP + points**varying * _PRODUCT
    return vocabulary >= HEAD_SHARE * entries and mixes * _PLAIN > 1.5 * (cost + CHECKS * _PLAIN)


def _interpolated(
    z: Tensor, mixes: Tensor, grid: _Grid, entries: int, tolerance: float
) -> tuple[Tensor, Tensor, float]:
    """Values (M, g) of a group of tokens, which of them miss the tolerance (g,), and the largest deviation of others.

    `base` is z in the middle of the box, less its largest entry; `rate` are the żₖ about their means there. Both
    constants, linear in λ, are added in the end.
    """
    middle = grid.box.middle.to(z.dtype)
    base = torch.einsum("k,gkv->gv", middle, z[:, 1:]).add_(z[:, 0])
    top = base.amax(1, keepdim=True)
    base.sub_(top)
    p = base.exp()
    mean = (z[:, 1:] @ p[:, :, None]) / p.sum(1)[:, None, None]
    rate = z[:, 1:] - mean
    reach = rate.abs().amax(2).double() @ grid.box.radius
    chosen = _closest(base, rate, grid.box, entries)
    head = base.gather(1, chosen), rate.gather(2, chosen[:, None].expand(-1, rate.shape[1], -1))
    tail = grid.sums(p.scatter_(1, chosen, 0.0), rate)  # (g, J)
    whole = tail + _head_sums(*head, grid.offsets)
    share = (tail / whole).amax(1)
    log_tail = torch.maximum(tail, 1e-3 * tolerance * whole).log()
    error = grid.remainder(log_tail, torch.finfo(z.dtype).eps / 4) * share
    sums = (grid.interpolation @ log_tail.mT).exp().mT + _head_sums(*head, grid.targets)
    values = (sums.log() + top.double() + mean[:, :, 0].double() @ grid.targets.mT).mT
    deviations = (values[grid.worst] - plain_sums(z, mixes[grid.worst])).abs().amax(0)
    good = (reach <= RANGE) & (MARGIN * error <= tolerance) & (deviations <= tolerance)  # false for NaN
    return values, ~good, float(deviations[good].max()) if good.any() else 0.0


def _closest(base: Tensor, rate: Tensor, box: _Box, entries: int) -> Tensor:
    """Indices (g, H) of the entries nearest to the largest logit at a corner, mid-edge or the middle of the box."""
    score = torch.full_like(base, -math.inf)
    for place in itertools.product((-1.0, 0.0, 1.0), repeat=len(box.radius)):
        steps = [(axis, sign * float(r)) for axis, (sign, r) in enumerate(zip(place, box.radius, strict=True)) if r]
        if any(sign and not r for sign, r in zip(place, box.radius, strict=True)):
            continue  # an axis that does not vary
        logits = base.clone()
        for axis, step in steps:
            if step:
                logits.add_(rate[:, axis], alpha=step)
        torch.maximum(score, logits.sub_(logits.amax(1, keepdim=True)), out=score)
    return score.topk(entries, dim=1, sorted=False).indices


def _head_sums(base: Tensor, rate: Tensor, offsets: Tensor) -> Tensor:
    """Σ over the head (g, M) in float64, at λ = middle + offsets; base (g, H), rate (g, K, H)."""
    parts = []
    for part in offsets.to(base.dtype).split(max(1, _block(base) // base.numel())):
        logits = torch.addcmul(base[:, None], part[:, :1], rate[:, None, 0])
        for axis in range(1, part.shape[1]):
            logits.addcmul_(part[:, axis, None], rate[:, None, axis])
        parts.append(logits.exp_().sum(2).double())
    return torch.cat(parts, 1)


@dataclass(frozen=True)
class _Box:
    """The box that some λ span: its middle and its half-widths (K,), in float64."""

    middle: Tensor
    radius: Tensor

    @staticmethod
    def around(mixes: Tensor) -> _Box:
        low, high = mixes.amin(0), mixes.amax(0)
        return _Box((low + high) / 2, (high - low) / 2)

    @property
    def varying(self) -> int:
        return int((self.radius > 0).sum())

    def halves(self, mixes: Tensor, z: Tensor) -> list[Tensor]:
        """Indices of the mixes on either side of the middle of the axis along which the logits change most."""
        change = z[:, 1:].abs().amax(2).amax(0).double().nan_to_num(nan=1.0, posinf=1e30).clamp(min=1e-30)
        widest = int((self.radius * change).argmax())
        below = mixes[:, widest] <= self.middle[widest]
        return [side.nonzero()[:, 0] for side in (below, ~below)]


class _Grid:
    """Chebyshev–Lobatto points of a box, `points` along every axis that varies, and interpolation from them.

    Attributes:
        offsets: the points less the middle (J, K), the last axis running fastest.
        targets: the λ less the middle (M, K).
        interpolation: (M, J), takes the values at the points to those at the λ.
        worst: indices of the λ that lie farthest from the points, where interpolation errs most.
    """

    def __init__(self, box: _Box, points: int, mixes: Tensor) -> None:
        self.box, self.targets = box, mixes - box.middle
        self.sizes = [points if radius > 0 else 1 for radius in box.radius]
        device = box.radius.device
        self.nodes = [_points(size, device) for size in self.sizes]
        self.inverses = [torch.linalg.inv(_polynomials(nodes, len(nodes))) for nodes in self.nodes]
        steps = [nodes * radius for nodes, radius in zip(self.nodes, box.radius, strict=True)]
        self.offsets = torch.cartesian_prod(*steps).view(-1, len(steps))
        matrix = torch.ones(len(mixes), 1, dtype=torch.float64, device=device)
        distance = torch.zeros(len(mixes), dtype=torch.float64, device=device)
        for axis, size in enumerate(self.sizes):
            if size > 1:
                scaled = (self.targets[:, axis] / box.radius[axis]).clamp(-1, 1)
                line = _polynomials(scaled, size) @ self.inverses[axis]
                matrix = (matrix[:, :, None] * line[:, None]).flatten(1)
                angle = torch.acos(scaled)
                distance += (angle.sin() * ((size - 1) * angle).sin()).abs()
        self.interpolation = matrix
        self.worst = distance.topk(min(CHECKS, len(mixes))).indices

    def sums(self, weights: Tensor, rate: Tensor) -> Tensor:
        """Σ_v w_v e^{Σₖ δₖ rateₖ} (g, J) in float64 at all points δ; weights (g, V), rate (g, K, V)."""
        total: Tensor | None = None
        step = max(1, _block(weights) // (len(weights) * max(self.sizes)))
        for start in range(0, weights.shape[1], step):
            part = slice(start, start + step)
            factors = [self._factor(axis, rate[:, axis, part]) for axis in range(len(self.sizes))]
            *rest, last = factors
            left = weights[:, None, part]
            for factor in rest:
                left = (left[:, :, None] * factor[:, None]).flatten(1, 2)
            product = (left @ last.mT).flatten(1).double()
            total = product if total is None else total + product
        assert total is not None
        return total

    def _factor(self, axis: int, rate: Tensor) -> Tensor:
        """e^{δ·rate} (g, points, v); half of the points are the negatives of the others, and need no exponential."""
        size = self.sizes[axis]
        half = size // 2
        steps = (self.nodes[axis][:half] * self.box.radius[axis]).to(rate.dtype)
        factor = rate.new_empty(len(rate), size, rate.shape[1])
        torch.mul(rate[:, None], steps[:, None], out=factor[:, :half]).exp_()
        torch.reciprocal(factor[:, :half], out=factor[:, half : 2 * half])
        factor[:, 2 * half :] = 1.0
        return factor

    def remainder(self, values: Tensor, rounding: float = 0.0) -> Tensor:
        """What the coefficients beyond the grid add (g,): the last four along each axis, continued as they fall off."""
        coefficients = values.view(len(values), *self.sizes)
        for axis, inverse in enumerate(self.inverses, start=1):
            coefficients = torch.tensordot(coefficients, inverse, dims=([axis], [1])).movedim(-1, axis)
        size, total = (coefficients.abs() - rounding).clamp(min=0), values.new_zeros(len(values))
        for axis, count in enumerate(self.sizes, start=1):
            if count > 1:
                before, last, end = (
                    size.narrow(axis, start, length).flatten(1).sum(1)
                    for start, length in ((count - 8, 4), (count - 4, 4), (count - 2, 2))
                )
                ratio = (last / before.clamp(min=1e-300)).clamp(max=SLOWEST)
                total += torch.maximum(end, 2 * last * ratio / (1 - ratio))
        return total


def _points(count: int, device: torch.device) -> Tensor:
    """The Chebyshev–Lobatto points of [−1, 1]: those above 0, their negatives in the same order, 0 if it is one."""
    upper = torch.cos(torch.arange(count // 2, dtype=torch.float64, device=device) * (math.pi / max(count - 1, 1)))
    return torch.cat([upper, -upper, upper.new_zeros(count % 2)])


def _polynomials(x: Tensor, count: int) -> Tensor:
    """Chebyshev polynomials T₀, …, T_{count−1} at x: (len(x), count)."""
    return torch.cos(torch.arange(count, device=x.device) * torch.acos(x)[:, None])


def _block(x: Tensor) -> int:
    return BLOCK_CPU if x.device.type == "cpu" else BLOCK_ACCELERATOR
