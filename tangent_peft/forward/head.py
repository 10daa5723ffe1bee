"""Per-token log-probabilities under primal and linearized logits, from hidden states, without (B, T, V) logits.

With hidden state h, its tangent ḣ, head W, b and the head's own tangent Δ (dense or B·A), the logits of a token are

    z₀ = s·(W h + b)                        reference, f(x; θ₀)
    z  = z₀ + ż,   ż = s·(W ḣ + Δ h)        policy, f_lin

each followed by the model's soft-cap c·tanh(·/c), if any. Two quantities can be linearized (the first is
TS-DPO's):

    logits:      log p(y) = z_y − lse(z)                             a distribution; DPO's loss is not convex in τ
    log-probs:   log p(y) = log p₀(y) + ż_y − Σ_v p₀(v) ż_v          no distribution; DPO's loss is convex in τ

For the chosen label y and upstream gradient g of log p(y), with q the softmax of z, or of z₀ for log-probs:

    ∂/∂z = g·(onehot(y) − q) =: ζ           (times s, and the slope of the soft-cap)
    ḣ: Wᵀζ     Δ: ζ hᵀ     B: ζ (A h)ᵀ     A: (Bᵀζ) hᵀ     h: (W + Δ)ᵀζ     W: ζ (h + ḣ)ᵀ

(the last two for linearized logits only). Only tokens that carry a label are scored, in tiles of a chunk of tokens by a
part of the vocabulary, over which the softmax is taken online; the backward pass computes the logits of a tile anew,
in float32 as one product W (h + ḣ). The reference is never differentiated. This file knows tensors only: no model, no
loss.
Letters: N tokens, D hidden size, V vocabulary, R rank; in a tile n tokens, v entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from tangent_peft.forward.level import autocast_dtype
from tangent_peft.forward.softmax import OnlineSoftmax


TILE_CPU = (512, 8192)  # tokens and entries of the vocabulary: 16 MiB of logits in float32, a few times over
TILE_ACCELERATOR = (1024, 32768)  # 128 MiB likewise: large enough that reading W costs less than multiplying by it

Linearized: TypeAlias = Literal["logits", "log_probs"]


@dataclass(frozen=True)
class Head:
    """An affine head with its own tangent.

    Attributes:
        weight: W (V, D).
        bias: b (V,), or `None`.
        dense: dense Δ (V, D), or `None`.
        b: B (V, R) of a low-rank Δ, or `None`.
        a: A (R, D) of a low-rank Δ, or `None`.
        scale: s, the factor the model puts on its logits.
        softcap: c, or `None`.
    """

    weight: Tensor
    bias: Tensor | None = None
    dense: Tensor | None = None
    b: Tensor | None = None
    a: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class TokenScores:
    """What is known of each token's label and distribution, all (N,) in float32; only `log_probs` has a gradient.

    Attributes:
        log_probs: log p(y) of the policy, by linearized logits or linearized log-probs.
        ref_log_probs: log p(y) under the primal.
        entropy: entropy of the softmax of the linearized logits, in nats.
        log_sum_sq_probs: log Σ p² of the same distribution.
        mean_logits: mean linearized logit over the vocabulary.
        is_top1: whether y is the most likely token.
        kl: KL(policy ‖ reference) of the linearized logits, in nats.
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor
    kl: Tensor


def score_tokens(
    hidden_ND: Tensor,
    tangent_ND: Tensor | None,
    labels_N: Tensor,
    head: Head,
    linearized: Linearized = "logits",
    probe: Tensor | None = None,
) -> TokenScores:
    """Scores every token; exact, with exact gradients in the tangent and in all parameters of the head.

    Args:
        hidden_ND: h of each token, the primal.
        tangent_ND: ḣ, or `None` if only the head carries a tangent.
        labels_N: the token that follows.
        head: the head and its tangent.
        linearized: which quantity is linear in τ.
        probe: a scalar 1 that scales nothing and receives ⟨∂L/∂f_lin, J·τ⟩ as its gradient, one side of the adjoint
            identity.

    Raises:
        ValueError: for linearized log-probs with a primal that trains, whose gradient is of second order.
    """
    learned = (head.weight, head.bias, head.dense, head.b, head.a)
    primals = [x for x in (hidden_ND, head.weight, head.bias) if x is not None and x.requires_grad]
    if linearized == "log_probs" and torch.is_grad_enabled() and primals:
        raise ValueError(
            "Linearized log-probs need a frozen base, but a weight below or at the head trains beside the tangents "
            "(`modules_to_save`?). Use linearized logits, `TangentDPOConfig(linearized='logits')`."
        )
    options = (labels_N, head.scale, head.softcap, linearized)
    return TokenScores(*_ScoreTokens.apply(hidden_ND, tangent_ND, *learned, probe, *options))


@dataclass(frozen=True)
class _Tile:
    """A part of the problem, in its compute dtype: some tokens, some entries of the vocabulary.

    Logits are (n, v) in at least float32, before the soft-cap.
    """

    hidden: Tensor  # (n, D)
    tangent: Tensor | None  # (n, D)
    weight: Tensor  # (v, D)
    bias: Tensor | None  # (v,)
    dense: Tensor | None  # (v, D)
    b: Tensor | None  # (v, R)
    a: Tensor | None  # (R, D)
    scale: float
    softcap: float | None
    linearized: Linearized

    def primal_logits(self, shift: Tensor | None = None) -> Tensor:
        """z₀, or s·(W (h + shift) + b)."""
        h = self.hidden if shift is None else self.hidden + shift
        return self._scaled(h @ self.weight.mT if self.bias is None else torch.addmm(self.bias, h, self.weight.mT))

    def own_tangent(self) -> Tensor | None:
        """s·Δ h, what the head's own tangent adds."""
        own = None
        if self.dense is not None:
            own = self.hidden @ self.dense.mT
        if self.b is not None and self.a is not None:
            low_rank = (self.hidden @ self.a.mT) @ self.b.mT
            own = low_rank if own is None else own + low_rank
        return None if own is None else self._scaled(own)

    def tangent_logits(self) -> Tensor | None:
        """ż; `None` where nothing carries a tangent."""
        own = self.own_tangent()
        if self.tangent is None:
            return own
        through = self._scaled(self.tangent @ self.weight.mT)
        return through if own is None else through.add_(own)

    def differentiated_logits(self) -> Tensor:
        """The logits whose softmax is q: as one product with W where rounding h + ḣ loses nothing that z has."""
        if self.linearized == "log_probs":
            return self.primal_logits()
        if self.hidden.dtype.itemsize < 4:
            return _policy_logits(self.primal_logits(), self.tangent_logits())
        logits, own = self.primal_logits(self.tangent), self.own_tangent()
        return logits if own is None else logits.add_(own)

    def capped(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits after the soft-cap, and its slope there."""
        if self.softcap is None:
            return logits, None
        bounded = torch.tanh(logits / self.softcap)
        return bounded * self.softcap, 1 - bounded**2

    def _scaled(self, logits: Tensor) -> Tensor:
        logits = _upcast(logits)
        return logits if self.scale == 1.0 else logits * self.scale


@dataclass(frozen=True)
class _Problem:
    """All tensors of one call in its compute dtype: h, ḣ, W, b, Δ, B, A."""

    tensors: tuple[Any, ...]
    scale: float
    softcap: float | None
    linearized: Linearized

    def rows(self) -> list[slice]:
        """Chunks of tokens."""
        return _slices(self.tensors[0].shape[0], self._tile_size[0])

    def tiles(self, rows: slice) -> Iterator[tuple[slice, _Tile]]:
        """The tiles of a chunk of tokens, with the part of the vocabulary that each covers."""
        hidden, tangent, weight, bias, dense, b, a = self.tensors
        h, dh = hidden[rows], None if tangent is None else tangent[rows]
        options = self.scale, self.softcap, self.linearized
        for columns in _slices(weight.shape[0], self._tile_size[1]):
            part: list[Any] = [None if x is None else x[columns] for x in (weight, bias, dense, b)]
            yield columns, _Tile(h, dh, part[0], part[1], part[2], part[3], a, *options)

    @property
    def _tile_size(self) -> tuple[int, int]:
        return TILE_CPU if self.tensors[0].device.type == "cpu" else TILE_ACCELERATOR


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _policy_logits(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """z, written so that τ = 0 gives z₀ bit for bit."""
    return primal if tangent is None else primal + tangent


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _ScoreTokens(torch.autograd.Function):
    """See the derivation at the top of the file."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tangent: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *learned, probe, labels, scale, softcap, linearized = rest
        device = hidden.device.type
        dtype = autocast_dtype(device) or hidden.dtype
        ctx.options = dtype, scale, softcap, linearized
        problem = _problem((hidden, tangent, *learned), *ctx.options)
        with torch.autocast(device, enabled=False):
            chunks = [_describe(problem, rows, labels[rows]) for rows in problem.rows()]
        *fields, normalizer = map(torch.cat, zip(*chunks, strict=True)) if chunks else _nothing(hidden)
        ctx.save_for_backward(hidden, tangent, *learned, probe, labels, normalizer)
        ctx.mark_non_differentiable(*fields[1:])
        ctx.set_materialize_grads(False)
        return tuple(fields)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        *inputs, probe, labels, normalizer = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(inputs) + 5)
        problem = _problem(inputs, *ctx.options)
        *needs, probed = ctx.needs_input_grad[: len(inputs) + 1]
        grads = [
            torch.zeros_like(x, dtype=_upcast(x).dtype) if need else None for x, need in zip(inputs, needs, strict=True)
        ]
        probe_grad = torch.zeros_like(probe, dtype=torch.float64) if probed else None
        for rows in problem.rows():
            for columns, tile in problem.tiles(rows):
                zeta = _cotangent(tile, labels[rows] - columns.start, normalizer[rows], grad[rows])
                tangent = None if probe_grad is None else tile.tangent_logits()
                if probe_grad is not None and tangent is not None:
                    probe_grad += (zeta * tangent).sum(dtype=torch.float64)
                _pull_back(tile, zeta.mul_(tile.scale).to(tile.hidden.dtype), rows, columns, grads)
        cast = (g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
        return (*cast, None if probe_grad is None else probe_grad.to(probe.dtype), None, None, None, None)


def _problem(tensors: Any, dtype: torch.dtype, *options: Any) -> _Problem:
    return _Problem(tuple(None if x is None else x.detach().to(dtype) for x in tensors), *options)


def _describe(problem: _Problem, rows: slice, labels: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenScores` for a chunk, and the log-sum-exp of the logits whose softmax is q."""
    policy, reference = OnlineSoftmax(labels), OnlineSoftmax(labels)
    total: Any = 0
    for columns, tile in problem.tiles(rows):
        primal, tangent = tile.primal_logits(), tile.tangent_logits()
        z, _ = tile.capped(_policy_logits(primal, tangent))
        z0, slope = tile.capped(primal)
        total = total + z.sum(-1)
        policy.add(columns.start, z, z, z0)
        change = torch.zeros_like(z) if tangent is None else tangent if slope is None else tangent * slope
        reference.add(columns.start, z0, *([change] if problem.linearized == "log_probs" else []))
    (mean_policy, mean_reference), lse, ref_lse = policy.means(), policy.log_sum_exp(), reference.log_sum_exp()
    log_probs, ref_log_probs = policy.of_label[0] - lse, reference.of_label[0] - ref_lse
    if problem.linearized == "log_probs":
        log_probs = ref_log_probs + reference.of_label[1] - reference.means()[0]
    return (
        log_probs,
        ref_log_probs,
        lse - mean_policy,  # entropy
        policy.log_sum_of_squares(),
        total / problem.tensors[2].shape[0],
        policy.of_label[0] >= policy.top,
        mean_policy - mean_reference - (lse - ref_lse),  # KL
        ref_lse if problem.linearized == "log_probs" else lse,
    )


def _cotangent(tile: _Tile, labels: Tensor, normalizer: Tensor, grad: Tensor) -> Tensor:
    """ζ of a tile (n, v), with the soft-cap's slope and without s; `labels` count from the tile's first entry."""
    logits, slope = tile.capped(tile.differentiated_logits())
    zeta = logits.sub(normalizer[:, None]).exp_().mul_(-grad[:, None])
    inside = (labels >= 0) & (labels < zeta.shape[1])
    zeta[inside, labels[inside]] += grad[inside].to(zeta.dtype)
    return zeta if slope is None else zeta.mul_(slope)


def _nothing(hidden: Tensor) -> tuple[Tensor, ...]:
    empty = hidden.new_zeros(0, dtype=torch.float32)
    return (empty, *(empty.clone() for _ in range(4)), empty.bool(), empty.clone(), empty.clone())


def _pull_back(tile: _Tile, zeta: Tensor, rows: slice, columns: slice, grads: list[Tensor | None]) -> None:
    """Adds a tile's share to the gradients of h, ḣ, W, b, Δ, B, A, where they are asked for."""
    g_hidden, g_tangent, g_weight, g_bias, g_dense, g_b, g_a = grads
    h = tile.hidden
    through_weight = zeta @ tile.weight if g_hidden is not None or g_tangent is not None else None
    if g_tangent is not None and through_weight is not None:
        g_tangent[rows] += through_weight
    if g_hidden is not None and through_weight is not None:
        g_hidden[rows] += through_weight
        if tile.dense is not None:
            g_hidden[rows] += zeta @ tile.dense
        if tile.b is not None and tile.a is not None:
            g_hidden[rows] += (zeta @ tile.b) @ tile.a
    if g_weight is not None:
        g_weight[columns] += zeta.mT @ (h if tile.tangent is None else h + tile.tangent)
    if g_bias is not None:
        g_bias[columns] += zeta.sum(0)
    if g_dense is not None:
        g_dense[columns] += zeta.mT @ h
    if g_b is not None and tile.a is not None:
        g_b[columns] += zeta.mT @ (h @ tile.a.mT)
    if g_a is not None and tile.b is not None:
        g_a += (zeta @ tile.b).mT @ h
