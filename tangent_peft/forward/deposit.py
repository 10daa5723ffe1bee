"""What a wrapped layer does while its block is replayed: return W x + b, and leave gᵀx with τ in backward.

f_lin is linear in τ, so the gradient of a layer's ΔW is the one its weight would have at θ₀: gᵀx. For ΔW = B·A,

    B: gᵀ (A x)     A: (Bᵀ g)ᵀ x

Where τ does something else than multiply x, autograd finds the gradient: `leave` starts τ's graph at its parameters,
`graft` joins it to the primal without changing the value.

This file knows tensors only.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


_state = threading.local()  # `replay`: what the replay that runs in this thread collects


def is_replaying() -> bool:
    """Whether this thread replays a block for its backward pass."""
    return "replay" in vars(_state)


@dataclass
class Collected:
    """The gradients that the wrapped layers of a replayed block leave.

    They do not go through autograd: a hook that someone put on a parameter then fires once, in the outer backward.

    Attributes:
        anchor: a scalar that requires a gradient, so that layers whose input requires none have a backward.
        direct: they do go through autograd, for an engine that reduces the gradients of a block as its replay ends.
        gradients: by parameter.
    """

    anchor: Tensor
    direct: bool = False
    gradients: dict[Tensor, Tensor] = field(default_factory=dict)

    def add(self, parameter: Tensor, gradient: Tensor) -> None:
        """Adds to what a parameter has."""
        gradient = gradient.to(parameter.dtype)
        known = self.gradients.get(parameter)
        self.gradients[parameter] = gradient if known is None else known + gradient


@contextmanager
def replaying(direct: bool = False) -> Iterator[Collected]:
    """Makes the wrapped layers that this thread calls leave their tangents' gradients in what it yields."""
    outer, collected = vars(_state).get("replay"), Collected(torch.zeros((), requires_grad=True), direct)
    _state.replay = collected
    try:
        yield collected
    finally:
        del _state.replay
        if outer is not None:
            _state.replay = outer


def deposit(
    y: Tensor,
    x: Tensor,
    scale: float,
    dense: Tensor | None = None,
    b: Tensor | None = None,
    a: Tensor | None = None,
) -> Tensor:
    """Returns y unchanged; its backward leaves the gradient λ·gᵀx with the parameters of the tangent.

    Args:
        y: W x + b (…, out).
        x: the layer's input (…, in).
        scale: λ.
        dense: ΔW (out, in), or `None`.
        b: B (out, r), or `None`.
        a: A (r, in), or `None`.
    """
    replay: Collected = _state.replay
    factors = (dense, b, a)
    y = y if y.requires_grad else y.detach()  # changed in place, which autograd would lose on a view (of a kernel's)
    return _Deposit.apply(y, replay.anchor, x.detach(), scale, factors, replay, *(factors if replay.direct else ()))


class _Deposit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, anchor: Tensor, x: Tensor, *rest: Any) -> Tensor:
        scale, factors, replay, *direct = rest
        _, b, a = (None if f is None else f.detach() for f in factors)
        narrow = None if a is None else F.linear(x, a.to(x.dtype))
        keeps_x = any(f is not None and f.requires_grad for f in (factors[0], factors[2]))
        ctx.save_for_backward(x if keeps_x else None, narrow, b)
        ctx.scale, ctx.factors, ctx.replay = scale, factors, replay
        if direct:  # an engine's hook gave a view, which a Function may not change
            return y.view_as(y)
        ctx.mark_dirty(y)  # nobody else has it, and unlike a view it may be changed in place afterwards
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved: Any = (None if t is None else _rows(t).to(grad.dtype) for t in ctx.saved_tensors)
        (x, narrow, b), (to_dense, to_b, to_a) = saved, ctx.factors
        g = _rows(grad) if ctx.scale == 1.0 else _rows(grad) * ctx.scale
        found: list[Tensor | None] = [None, None, None]
        if to_dense is not None and to_dense.requires_grad:
            found[0] = g.mT @ x
        if to_b is not None and to_b.requires_grad:
            found[1] = g.mT @ narrow
        if to_a is not None and to_a.requires_grad:
            found[2] = (g @ b).mT @ x
        if ctx.replay.direct:
            return grad, None, None, None, None, None, *found
        for parameter, gradient in zip(ctx.factors, found, strict=True):
            if gradient is not None:
                ctx.replay.add(parameter, gradient)
        return grad, None, None, None, None, None


def leave(parameter: Tensor) -> Tensor:
    """The value of a parameter; its backward leaves the gradient that arrives here with that parameter."""
    if not parameter.requires_grad:
        return parameter
    replay: Collected = _state.replay
    if replay.direct:
        return parameter
    return _Leave.apply(replay.anchor, parameter, replay)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, parameter: Any, replay: Collected) -> Tensor:
        ctx.parameter, ctx.replay = parameter, replay
        return parameter.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ctx.replay.add(ctx.parameter, grad)
        return None, None, None


def graft(primal: Tensor, tangent: Tensor) -> Tensor:
    """The value of `primal`, in backward the sum of the two: the gradient of τ as that of a weight at θ₀."""
    return _Graft.apply(primal, tangent)


class _Graft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, primal: Tensor, tangent: Tensor) -> Tensor:
        return primal.view_as(primal)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(grad if need else None for need in ctx.needs_input_grad)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
