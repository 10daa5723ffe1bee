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

(the last two for linearized logits only). Only tokens that carry a label are scored, a chunk at a time; the backward
pass computes the logits of a chunk anew, in one product W (h + ḣ). The reference is never differentiated. This file
knows tensors only: no model, no loss.
Letters: N tokens, D hidden size, V vocabulary, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK_ELEMENTS = 2**22  # logits held at a time: 16 MiB in float32, a few times over

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
class _Problem:
    """The tensors of one call in its compute dtype; logits are (n, V) in at least float32, before the soft-cap."""

    hidden: Tensor
    tangent: Tensor | None
    weight: Tensor
    bias: Tensor | None
    dense: Tensor | None
    b: Tensor | None
    a: Tensor | None
    scale: float
    softcap: float | None
    linearized: Linearized

    def primal_logits(self, rows: slice, shift: Tensor | None = None) -> Tensor:
        """z₀, or s·(W (h + shift) + b)."""
        h = self.hidden[rows] if shift is None else self.hidden[rows] + shift
        return self._scaled(h @ self.weight.mT if self.bias is None else torch.addmm(self.bias, h, self.weight.mT))

    def own_tangent(self, rows: slice) -> Tensor | None:
        """s·Δ h, what the head's own tangent adds."""
        own = None
        if self.dense is not None:
            own = self.hidden[rows] @ self.dense.mT
        if self.b is not None and self.a is not None:
            low_rank = (self.hidden[rows] @ self.a.mT) @ self.b.mT
            own = low_rank if own is None else own + low_rank
        return None if own is None else self._scaled(own)

    def tangent_logits(self, rows: slice) -> Tensor:
        """ż."""
        own = self.own_tangent(rows)
        if self.tangent is None:
            return torch.zeros_like(self.primal_logits(rows)) if own is None else own
        through = self._scaled(self.tangent[rows] @ self.weight.mT)
        return through if own is None else through.add_(own)

    def differentiated_logits(self, rows: slice) -> Tensor:
        """The logits whose softmax is q, as one product with W."""
        if self.linearized == "log_probs":
            return self.primal_logits(rows)
        logits = self.primal_logits(rows, None if self.tangent is None else self.tangent[rows])
        own = self.own_tangent(rows)
        return logits if own is None else logits.add_(own)

    def capped(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits after the soft-cap, and its slope there."""
        if self.softcap is None:
            return logits, None
        bounded = torch.tanh(logits / self.softcap)
        return bounded * self.softcap, 1 - bounded**2

    def chunks(self) -> list[slice]:
        """Slices of tokens whose logits fit in `CHUNK_ELEMENTS`."""
        step = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return [slice(start, start + step) for start in range(0, self.hidden.shape[0], step)]

    def _scaled(self, logits: Tensor) -> Tensor:
        logits = _upcast(logits)
        return logits if self.scale == 1.0 else logits * self.scale


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _ScoreTokens(torch.autograd.Function):
    """See the derivation at the top of the file."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tangent: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *learned, probe, labels, scale, softcap, linearized = rest
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, tangent, *learned, probe, labels)
        ctx.options = dtype, scale, softcap, linearized
        problem = _problem((hidden, tangent, *learned), *ctx.options)
        with torch.autocast(device, enabled=False):
            chunks = [_describe(problem, rows, labels[rows]) for rows in problem.chunks()]
        fields = tuple(torch.cat(column) for column in zip(*chunks, strict=True)) if chunks else _nothing(hidden)
        ctx.mark_non_differentiable(*fields[1:])
        ctx.set_materialize_grads(False)
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        *inputs, probe, labels = ctx.saved_tensors
        if grad is None:
            return (None,) * (len(inputs) + 5)
        problem = _problem(inputs, *ctx.options)
        *needs, probed = ctx.needs_input_grad[: len(inputs) + 1]
        grads = [
            torch.zeros_like(x, dtype=_upcast(x).dtype) if need else None for x, need in zip(inputs, needs, strict=True)
        ]
        probe_grad = torch.zeros_like(probe, dtype=torch.float64) if probed else None
        for rows in problem.chunks():
            zeta = _cotangent(problem, rows, labels[rows], grad[rows])
            if probe_grad is not None:
                probe_grad += (zeta * problem.tangent_logits(rows)).sum(dtype=torch.float64)
            _pull_back(problem, zeta.mul_(problem.scale).to(problem.hidden.dtype), rows, grads)
        cast = (g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
        return (*cast, None if probe_grad is None else probe_grad.to(probe.dtype), None, None, None, None)


def _problem(tensors: Any, dtype: torch.dtype, scale: float, softcap: float | None, linearized: Linearized) -> _Problem:
    cast: list[Any] = [None if x is None else x.detach().to(dtype) for x in tensors]
    hidden, tangent, weight, bias, dense, b, a = cast
    return _Problem(hidden, tangent, weight, bias, dense, b, a, scale, softcap, linearized)


def _describe(problem: _Problem, rows: slice, labels: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenScores` for a chunk."""
    chosen = labels[:, None]
    primal, tangent = problem.primal_logits(rows), problem.tangent_logits(rows)
    # Written alike for policy and reference, so that τ = 0 gives equal log-probs bit for bit.
    policy, _ = problem.capped(primal + tangent)
    reference, slope = problem.capped(primal)
    (probs, lse, top), (ref_probs, ref_lse, _) = _distribution(policy), _distribution(reference)
    label_logit = policy.gather(1, chosen).squeeze(1)
    log_probs, ref_log_probs = label_logit - lse, reference.gather(1, chosen).squeeze(1) - ref_lse
    mean_policy = _dot(probs, policy)
    fields = (
        lse - mean_policy,  # entropy
        _dot(probs, probs).log(),
        policy.mean(-1),
        label_logit >= top,
        mean_policy - _dot(probs, reference) - (lse - ref_lse),  # KL
    )
    if problem.linearized == "log_probs":
        change = tangent if slope is None else tangent * slope
        log_probs = ref_log_probs + change.gather(1, chosen).squeeze(1) - _dot(ref_probs, change)
    return log_probs, ref_log_probs, *fields


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax (n, V), log-sum-exp (n,) and largest logit (n,), in few passes over the vocabulary."""
    probs, top = torch.softmax(logits, dim=-1), logits.amax(-1)
    return probs, top - probs.amax(-1).log(), top


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Σ_v left·right (n,), without a product of size (n, V)."""
    return torch.bmm(left[:, None, :], right[:, :, None]).view(-1)


def _cotangent(problem: _Problem, rows: slice, labels: Tensor, grad: Tensor) -> Tensor:
    """ζ of a chunk (n, V), with the soft-cap's slope and without s."""
    logits, slope = problem.capped(problem.differentiated_logits(rows))
    zeta = torch.softmax(logits, dim=-1).neg_()
    zeta.scatter_add_(1, labels[:, None], torch.ones_like(zeta[:, :1]))
    zeta.mul_(grad[:, None])
    return zeta if slope is None else zeta.mul_(slope)


def _nothing(hidden: Tensor) -> tuple[Tensor, ...]:
    empty = hidden.new_zeros(0, dtype=torch.float32)
    return (empty, *(empty.clone() for _ in range(4)), empty.bool(), empty.clone())


def _pull_back(problem: _Problem, zeta: Tensor, rows: slice, grads: list[Tensor | None]) -> None:
    """Adds a chunk's share to the gradients of h, ḣ, W, b, Δ, B, A, where they are asked for."""
    g_hidden, g_tangent, g_weight, g_bias, g_dense, g_b, g_a = grads
    h = problem.hidden[rows]
    through_weight = zeta @ problem.weight if g_hidden is not None or g_tangent is not None else None
    if g_tangent is not None and through_weight is not None:
        g_tangent[rows] += through_weight
    if g_hidden is not None and through_weight is not None:
        g_hidden[rows] += through_weight
        if problem.dense is not None:
            g_hidden[rows] += zeta @ problem.dense
        if problem.b is not None and problem.a is not None:
            g_hidden[rows] += (zeta @ problem.b) @ problem.a
    if g_weight is not None:
        g_weight += zeta.mT @ (h if problem.tangent is None else h + problem.tangent[rows])
    if g_bias is not None:
        g_bias += zeta.sum(0)
    if g_dense is not None:
        g_dense += zeta.mT @ h
    if g_b is not None and problem.a is not None:
        g_b += zeta.mT @ (h @ problem.a.mT)
    if g_a is not None and problem.b is not None:
        g_a += (zeta @ problem.b).mT @ h
