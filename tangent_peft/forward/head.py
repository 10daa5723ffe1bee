"""Per-token log-probabilities under primal and linearized logits, from hidden states, without (B, T, V) logits.

With hidden state h, its tangent ḣ, head W, b and the head's own tangent Δ (dense or B·A), the logits of a token are

    z₀ = s·(W h + b)                        reference, f(x; θ₀)
    z  = z₀ + s·(W ḣ + Δ h)                 policy, f_lin

each followed by the model's soft-cap c·tanh(·/c), if any. For the chosen label y and upstream gradient g of log p(y):

    ∂/∂z = g·(onehot(y) − softmax(z)) =: ζ          (times s, and the slope of the soft-cap)
    ḣ: Wᵀζ     Δ: ζ hᵀ     B: ζ (A h)ᵀ     A: (Bᵀζ) hᵀ     h: (W + Δ)ᵀζ     W: ζ (h + ḣ)ᵀ

Only tokens that carry a label are scored, a chunk at a time; the backward pass computes the logits of a chunk anew. The
reference is never differentiated. This file knows tensors only: no model, no loss.
Letters: N tokens, D hidden size, V vocabulary, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK_ELEMENTS = 2**22  # logits held at a time: 16 MiB in float32, a few times over


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
        log_probs: log p(y) under the linearized logits.
        ref_log_probs: log p(y) under the primal.
        entropy: entropy of the linearized distribution, in nats.
        log_sum_sq_probs: log Σ p².
        mean_logits: mean linearized logit over the vocabulary.
        is_top1: whether y is the most likely token.
    """

    log_probs: Tensor
    ref_log_probs: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logits: Tensor
    is_top1: Tensor


def score_tokens(hidden_ND: Tensor, tangent_ND: Tensor | None, labels_N: Tensor, head: Head) -> TokenScores:
    """Scores every token; exact, with exact gradients in the tangent and in all parameters of the head.

    Args:
        hidden_ND: h of each token, the primal.
        tangent_ND: ḣ, or `None` if only the head carries a tangent.
        labels_N: the token that follows.
        head: the head and its tangent.
    """
    learned = (head.weight, head.bias, head.dense, head.b, head.a)
    return TokenScores(*_ScoreTokens.apply(hidden_ND, tangent_ND, *learned, labels_N, head.scale, head.softcap))


@dataclass(frozen=True)
class _Problem:
    """The tensors of one call in its compute dtype."""

    hidden: Tensor
    tangent: Tensor | None
    weight: Tensor
    bias: Tensor | None
    dense: Tensor | None
    b: Tensor | None
    a: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, rows: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        """Reference and policy logits (n, V) of a chunk in at least float32, and the soft-cap's slope at the policy."""
        h = self.hidden[rows]
        reference = _upcast(h @ self.weight.mT if self.bias is None else torch.addmm(self.bias, h, self.weight.mT))
        policy = reference
        if self.tangent is not None:
            policy = policy + self.tangent[rows] @ self.weight.mT
        if self.dense is not None:
            policy = policy + h @ self.dense.mT
        if self.b is not None and self.a is not None:
            policy = policy + (h @ self.a.mT) @ self.b.mT
        if self.scale != 1.0:
            reference, policy = reference * self.scale, policy * self.scale
        if self.softcap is None:
            return reference, policy, None
        bounded = torch.tanh(policy / self.softcap)
        return torch.tanh(reference / self.softcap) * self.softcap, bounded * self.softcap, 1 - bounded**2

    def chunks(self) -> list[slice]:
        """Slices of tokens whose logits fit in `CHUNK_ELEMENTS`."""
        step = max(1, CHUNK_ELEMENTS // self.weight.shape[0])
        return [slice(start, start + step) for start in range(0, self.hidden.shape[0], step)]


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


class _ScoreTokens(torch.autograd.Function):
    """See the derivation at the top of the file."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, tangent: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        *learned, labels, scale, softcap = rest
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        ctx.save_for_backward(hidden, tangent, *learned, labels)
        ctx.scale, ctx.softcap, ctx.dtype = scale, softcap, dtype
        problem = _problem(dtype, hidden, tangent, learned, scale, softcap)
        with torch.autocast(device, enabled=False):
            chunks = [_describe(problem, rows, labels[rows]) for rows in problem.chunks()]
        fields = tuple(torch.cat(column) for column in zip(*chunks, strict=True)) if chunks else _nothing(hidden)
        ctx.mark_non_differentiable(*fields[1:])
        ctx.set_materialize_grads(False)
        return fields

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
        hidden, tangent, *learned, labels = ctx.saved_tensors
        inputs = [hidden, tangent, *learned]
        if grad is None:
            return (None,) * (len(inputs) + 3)
        problem = _problem(ctx.dtype, hidden, tangent, learned, ctx.scale, ctx.softcap)
        needs = ctx.needs_input_grad[: len(inputs)]
        grads = [
            torch.zeros_like(x, dtype=_upcast(x).dtype) if need else None for x, need in zip(inputs, needs, strict=True)
        ]
        for rows in problem.chunks():
            _, policy, slope = problem.logits(rows)
            zeta = torch.softmax(policy, dim=-1).neg_()
            zeta.scatter_add_(1, labels[rows, None], torch.ones_like(zeta[:, :1]))
            zeta.mul_((grad[rows] * ctx.scale)[:, None])
            _pull_back(problem, (zeta if slope is None else zeta * slope).to(ctx.dtype), rows, grads)
        cast = (g if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
        return (*cast, None, None, None)


def _problem(
    dtype: torch.dtype,
    hidden: Tensor,
    tangent: Tensor | None,
    learned: Any,
    scale: float,
    softcap: float | None,
) -> _Problem:
    cast: list[Any] = [None if x is None else x.detach().to(dtype) for x in (hidden, tangent, *learned)]
    h, dh, weight, bias, dense, b, a = cast
    return _Problem(h, dh, weight, bias, dense, b, a, scale, softcap)


def _describe(problem: _Problem, rows: slice, labels: Tensor) -> tuple[Tensor, ...]:
    """The fields of `TokenScores` for a chunk."""
    reference, policy, _ = problem.logits(rows)
    chosen = labels[:, None]
    ref_log_probs = reference.gather(1, chosen).squeeze(1) - reference.logsumexp(-1)
    # Written as for the reference, so that τ = 0 gives equal log-probs bit for bit.
    log_distribution = policy - policy.logsumexp(-1, keepdim=True)
    entropy = -(log_distribution.exp() * log_distribution).sum(-1)
    log_sum_sq_probs = (2 * log_distribution).logsumexp(-1)
    log_probs = policy.gather(1, chosen).squeeze(1) - policy.logsumexp(-1)
    return log_probs, ref_log_probs, entropy, log_sum_sq_probs, policy.mean(-1), policy.argmax(-1) == labels


def _nothing(hidden: Tensor) -> tuple[Tensor, ...]:
    empty = hidden.new_zeros(0, dtype=torch.float32)
    return (empty, *(empty.clone() for _ in range(4)), empty.bool())


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
