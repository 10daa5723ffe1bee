"""Affine layers whose arithmetic automatic differentiation does not see through: quantized ones.

Such a layer computes y = W x + b with a W that only its own kernel unpacks. No kernel has a forward derivative and not
all have a backward, but both follow from what the layer means:

    (x, ẋ) → (layer(x), W ẋ)        backward: g → Wᵀ g

* Where W can be read, it is unpacked for the one product W ẋ or Wᵀ g and dropped again. A kernel that also rounds its
  input (LLM.int8, dynamic activation quantization) is piecewise constant, and this is the derivative of the layer
  without that rounding, which is also what those kernels' own backward computes where they have one.
* Where W can not be read, the layer itself is called on ẋ, with its bias taken out: layer(ẋ) − b would cancel where
  the bias is larger than W ẋ. Its gradient is then the layer's own backward, and a layer that has none is refused.

This file knows modules and tensors; which modules are quantized, and how to read them, it is told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.hooks import RemovableHandle

from tangent_peft.forward.level import dual, split


ReadWeight: TypeAlias = Callable[[nn.Module], Tensor]

_GIVEN = "tangent_opaque_input"  # on the tensor that enters the layer: the input with its gradient, and its tangent
PROBE_TOLERANCE = 0.05  # kernels of half precision on a handful of numbers; what is not linear is off by order one


@dataclass(frozen=True)
class OpaqueLinear:
    """An affine layer whose derivative is not left to automatic differentiation.

    Attributes:
        layer: maps (…, in) to (…, out).
        name: its name in the model, for messages.
        read: gives W (out, in) of the layer; `None` where it can not be read.
        in_features: length of its input.
    """

    layer: nn.Module
    name: str
    read: ReadWeight | None
    in_features: int

    def linear_part(self, v: Tensor) -> Tensor:
        """W v (…, out), without the bias; differentiable in v (…, in).

        Raises:
            RuntimeError: if W can not be read, a gradient is asked for, and the layer has none.
        """
        if self.read is not None:
            return _Product.apply(v, self)
        with without_bias(self.layer):
            return self.layer(v)

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W (out, in), unpacked now."""
        assert self.read is not None
        return self.read(self.layer).detach().to(dtype)

    def register(self) -> list[RemovableHandle]:
        """Hooks that give every call of the layer its derivatives, in both modes."""
        return [self.layer.register_forward_pre_hook(self._enter), self.layer.register_forward_hook(self._leave)]

    # The hooks keep nothing between each other but what the input tensor itself carries: calls may nest or fail.

    def _enter(self, layer: nn.Module, args: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return None
        x, tangent = split(args[0])
        differentiated = self.read is not None and torch.is_grad_enabled() and x.requires_grad
        if tangent is None and not differentiated:
            return None
        given = x.detach() if differentiated else x
        vars(given)[_GIVEN] = (x, tangent)
        return (given, *args[1:])

    def _leave(self, layer: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        if not args or not isinstance(args[0], Tensor):
            return None
        x, tangent = vars(args[0]).pop(_GIVEN, (args[0], None))
        if torch.is_grad_enabled() and x.requires_grad:
            if self.read is not None:
                y = _Transposed.apply(x, _owned(y), self)
            elif not y.requires_grad:
                raise RuntimeError(_FORWARD_ONLY.format(self.name, type(layer).__name__))
            else:
                y = _owned(y)
        return y if tangent is None else dual(y, self.linear_part(tangent))


def _owned(y: Tensor) -> Tensor:
    """y as a tensor that may be changed in place: kernels return views, on which autograd would lose the change."""
    return y.clone() if y.requires_grad else y.detach()


class _Product(torch.autograd.Function):
    """W v; nothing is kept for its backward but the layer."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, opaque: OpaqueLinear) -> Tensor:
        ctx.opaque, ctx.dtype = opaque, v.dtype
        return F.linear(v, opaque.weight(v.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad @ ctx.opaque.weight(grad.dtype)).to(ctx.dtype), None


class _Transposed(torch.autograd.Function):
    """y as the layer gave it, whose backward is Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, opaque: OpaqueLinear) -> Tensor:
        ctx.opaque, ctx.dtype = opaque, x.dtype
        ctx.mark_dirty(y)  # nobody else has it, and unlike a view it may be changed in place afterwards
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return (grad @ ctx.opaque.weight(grad.dtype)).to(ctx.dtype), None, None


@contextmanager
def without_bias(layer: nn.Module) -> Iterator[None]:
    """The layer is linear instead of affine inside the `with` block, for every thread."""
    stores: tuple[Any, ...] = (layer._parameters, layer._buffers, vars(layer))
    owner = next((store for store in stores if "bias" in store), None)
    if owner is None or not isinstance(owner["bias"], Tensor):
        yield
        return
    bias = owner["bias"]
    owner["bias"] = None
    try:
        yield
    finally:
        owner["bias"] = bias


# ---- layers that can not be read -------------------------------------------------------------------------------------

_FORWARD_ONLY = (
    "Layer {!r}, a {}, has no backward and its weight can not be read, so nothing below it can be trained. Load the "
    "model with a kernel that has one (for GPTQ and AWQ the `torch` backend), or quantize it with bitsandbytes, "
    "torchao or HQQ. An axis that is trained elsewhere can be loaded and run on this model."
)
_NOT_AFFINE = (
    "Layer {!r}, a {}, is not affine (W(u + v) and W u + W v differ by {:.0%}), so it has no derivative that could be "
    "told without knowing its kernel. What works: torch.nn.Linear, bitsandbytes 4-bit and 8-bit, torchao, HQQ, and "
    "GPTQ, AWQ, EETQ and the like as far as they are affine. Exclude the layer's block, or dequantize the model."
)


def check_unreadable(opaque: Iterable[OpaqueLinear], dtype: torch.dtype, training: bool) -> None:
    """Tries one layer of each type that can not be read: is it affine, and is its backward its transpose?

    Args:
        opaque: all layers; those that can be read are not tried.
        dtype: of the activations.
        training: whether the backward is needed.

    Raises:
        ValueError: naming the layer, if it is not affine, or has no backward and one is needed.
    """
    tried: set[type[nn.Module]] = set()
    for rule in opaque:
        if rule.read is None and type(rule.layer) not in tried:
            tried.add(type(rule.layer))
            _probe(rule, dtype, training)


def _probe(rule: OpaqueLinear, dtype: torch.dtype, training: bool) -> None:
    tensors = [*rule.layer.parameters(), *rule.layer.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta":
        return
    angles = torch.arange(2 * rule.in_features, dtype=torch.float32, device=device).view(2, 1, -1)
    u, v = torch.sin(angles * angles).to(dtype)  # as good as random, and draws nothing
    with torch.no_grad():
        expected = rule.linear_part(u).float() + rule.linear_part(v).float()
        error = _relative(rule.linear_part(u + v), expected)
    kind = type(rule.layer).__name__
    if error > PROBE_TOLERANCE:
        raise ValueError(_NOT_AFFINE.format(rule.name, kind, error))
    if training and not _has_transpose(rule, u):
        raise ValueError(_FORWARD_ONLY.format(rule.name, kind))


def _has_transpose(rule: OpaqueLinear, u: Tensor) -> bool:
    """Whether ‖W u‖² = ⟨u, Wᵀ W u⟩."""
    with torch.enable_grad():
        u = u.detach().requires_grad_()
        try:
            y = rule.linear_part(u)
            (back,) = torch.autograd.grad(y, u, y.detach())
        except RuntimeError:  # no backward at all, or one that leads nowhere
            return False
    return _relative((u.detach().float() * back.float()).sum(), y.detach().float().square().sum()) <= PROBE_TOLERANCE


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))
