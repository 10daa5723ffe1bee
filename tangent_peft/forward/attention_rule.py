"""The derivative of softmax attention, which PyTorch lacks for its fused kernels, by chunks of queries.

For one head, with S = s·QKᵀ + M, P = softmax(S), O = PV and tangents dQ, dK, dV:

    dS = s·(dQ Kᵀ + Q dKᵀ)                       S is bilinear in Q, K
    dO = (P∘dS) V − rowsum(P∘dS) ∘ O + P dV      the softmax Jacobian is P∘(· − rowsum(P∘·))

dO is linear in (dQ, dK, dV), and its transpose is attention's ordinary backward at (Q, K, V):

    Ḡ = P ∘ (G Vᵀ − rowsum(G∘O)),   dQ: s·Ḡ K,   dK: s·Ḡᵀ Q,   dV: Pᵀ G.

A soft-cap S ↦ c·tanh(S/c) multiplies dS and Ḡ by 1 − tanh². An attention sink only adds a column to the softmax's
denominator. Both directions run over chunks of queries, so that memory is O(chunk · keys) and nothing of size T·S is
kept for the backward pass. This file knows tensors only: no model, no dual level.
Letters: B batch, T queries, S keys, H heads, K key/value heads, G = H/K, E head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


CHUNK = 128  # queries per chunk, which bounds what is held at a time: O(chunk · keys)


@dataclass(frozen=True)
class AttentionShape:
    """What besides Q, K, V determines the attention weights.

    Attributes:
        scale: s, the factor on QKᵀ.
        causal: query t sees the keys up to t + offset.
        offset: 0 (upper-left alignment, as in `scaled_dot_product_attention`) or S − T (lower-right, flash kernels).
        window: number of most recent keys a query sees, itself included; only used with `causal`.
        softcap: c, or `None`.
    """

    scale: float
    causal: bool = False
    offset: int = 0
    window: int | None = None
    softcap: float | None = None


class AttentionTangent(torch.autograd.Function):
    """dO of (dQ, dK, dV) at fixed (Q, K, V), with attention's own backward as its transpose."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor, *rest: Any) -> Tensor:
        """Shapes as in `tangent_attention`, `out` and the result (B, H, T, E)."""
        *tangents, mask, sinks, shape = rest
        ctx.save_for_backward(q, k, v, out, mask, sinks)
        ctx.shape = shape
        with torch.autocast(q.device.type, enabled=False):
            return tangent_by_chunks((q, k, v, out), tuple(tangents), mask, sinks, shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Cotangents of dQ, dK, dV from `grad` (B, H, T, E)."""
        q, k, v, out, mask, sinks = ctx.saved_tensors
        shape = ctx.shape
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for rows, keys in _chunks(q, k, shape):
            weights, slope = _weights(q[:, :, rows], k[:, :, keys], mask, sinks, shape, rows, keys)
            g = _group(grad[:, :, rows], k)
            o = _group(out[:, :, rows], k)
            centered = _per_query(g @ v[:, :, keys].mT, weights) - (g * o).sum(-1).view(*weights.shape[:-1], 1)
            score_grad = _flat((weights * centered if slope is None else weights * centered * slope) * shape.scale)
            grad_q[:, :, rows] = (score_grad @ k[:, :, keys]).view(q[:, :, rows].shape)
            grad_k[:, :, keys] += score_grad.mT @ _group(q[:, :, rows], k)
            grad_v[:, :, keys] += _flat(weights).mT @ g
        needs = ctx.needs_input_grad[4:7]
        grads = (g if need else None for g, need in zip((grad_q, grad_k, grad_v), needs, strict=True))
        return (None, None, None, None, *grads, None, None, None)


def tangent_by_chunks(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    mask: Tensor | None,
    sinks: Tensor | None,
    shape: AttentionShape,
) -> Tensor:
    """dO (B, H, T, E) for primals (Q, K, V, O) and tangents (dQ, dK, dV); differentiable by plain autograd."""
    q, k, v, out = primals
    dq, dk, dv = tangents
    chunks = []
    for rows, keys in _chunks(q, k, shape):
        q_t, k_s, v_s = _cut(q, rows), _cut(k, keys), _cut(v, keys)
        weights, slope = _weights(q_t, k_s, mask, sinks, shape, rows, keys)
        from_query = None if dq is None else _group(_cut(dq, rows), k) @ k_s.mT
        from_key = None if dk is None else _group(q_t, k) @ _cut(dk, keys).mT
        scores = _plus(from_query, from_key)
        result = None
        if scores is not None:
            weighted = weights * _per_query(scores * shape.scale, weights)
            weighted = weighted if slope is None else weighted * slope
            row_sums = weighted.sum(-1, keepdim=True)
            result = _flat(weighted) @ v_s - _flat(row_sums) * _group(_cut(out, rows), k)
        result = _plus(result, None if dv is None else _flat(weights) @ _cut(dv, keys))
        chunks.append(result.view(*q_t.shape[:3], v.shape[-1]))
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=2)


def _cut(x: Tensor, part: slice) -> Tensor:
    """Some queries or keys of x (B, H or K, T or S, E); x itself where these are all, as in decoding."""
    return x if part == slice(0, x.shape[2]) else x[:, :, part]


def _plus(left: Tensor | None, right: Tensor | None) -> Any:
    return right if left is None else left if right is None else left + right


def _chunks(q: Tensor, k: Tensor, shape: AttentionShape) -> list[tuple[slice, slice]]:
    """Slices of queries with the slice of keys that any of them may see."""
    queries, total = q.shape[2], k.shape[2]
    result = []
    for start in range(0, queries, CHUNK):
        stop = min(start + CHUNK, queries)
        last = min(stop + shape.offset, total) if shape.causal else total
        first = max(0, start + shape.offset + 1 - shape.window) if shape.causal and shape.window else 0
        result.append((slice(start, stop), slice(first, last)))
    return result


def _weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    shape: AttentionShape,
    rows: slice,
    keys: slice,
) -> tuple[Tensor, Tensor | None]:
    """P (B, K, G, t, s) of a chunk in q's dtype, and the soft-cap's slope of the same shape.

    A query that may see no key at all has P = 0, as in `scaled_dot_product_attention`.
    """
    batch, heads, queries, _ = q.shape
    groups = heads // k.shape[1]
    scores = (_group(q, k) @ k.mT).view(batch, k.shape[1], groups, queries, k.shape[2])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * shape.scale
    slope = None
    if shape.softcap is not None:
        bounded = torch.tanh(scores / shape.softcap)
        scores, slope = bounded * shape.softcap, (1 - bounded**2).to(q.dtype)
    allowed = _allowed(mask, k, shape, rows, keys, heads)
    if allowed is not None and allowed.dtype != torch.bool:
        scores, allowed = scores + allowed, None
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.view(1, k.shape[1], groups, 1, 1).expand(batch, -1, -1, queries, 1).to(scores.dtype)
        weights = torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    if allowed is not None:
        weights = weights * allowed
    return weights.to(q.dtype), slope


def _allowed(
    mask: Tensor | None, k: Tensor, shape: AttentionShape, rows: slice, keys: slice, heads: int
) -> Tensor | None:
    """Which keys a chunk's queries may see, or the additive mask: broadcastable to (B, K, G, t, s)."""
    allowed = None
    if mask is not None:
        allowed = mask[..., keys] if mask.shape[-2] == 1 else mask[..., rows, keys]
        if allowed.shape[1] == heads:
            allowed = allowed.view(allowed.shape[0], k.shape[1], -1, *allowed.shape[-2:])
        else:
            allowed = allowed.unsqueeze(2)
    if shape.causal:
        row = torch.arange(rows.start, rows.stop, device=k.device)[:, None] + shape.offset
        column = torch.arange(keys.start, keys.stop, device=k.device)[None, :]
        visible = column <= row
        if shape.window is not None:
            visible &= column > row - shape.window
        allowed = visible if allowed is None else allowed & visible
    return allowed


def _group(x_BHTE: Tensor, k: Tensor) -> Tensor:
    """(B, H, t, E) → (B, K, G·t, E): the queries that share a key head side by side, so no key is repeated."""
    batch, _, _, size = x_BHTE.shape
    return x_BHTE.reshape(batch, k.shape[1], -1, size)


def _per_query(x: Tensor, weights: Tensor) -> Tensor:
    """(B, K, G·t, s) → (B, K, G, t, s)."""
    return x.view(weights.shape)


def _flat(x: Tensor) -> Tensor:
    """(B, K, G, t, s) → (B, K, G·t, s)."""
    return x.flatten(2, 3)
