"""The derivative of norms in one step, instead of operation by operation.

A norm maps x to y = tail(x̂): first x̂ = r·x with r = 1/√(mean(x²) + ε), or r·(x − mean(x)) with the variance, then a
linear tail that multiplies by the frozen gain and casts. With c = x − mean(x), or x, and the tangent ẋ,

    x̂' = r·(ċ − x̂·mean(x̂∘ċ))        ẏ = tail(x̂'), without the bias

The value y stays the module's own. In torch 2.13 an operation of a dual tensor with one that carries no tangent, as ε
and the gain, first builds a tensor of zeros and checks its shape in Python; in a decoding step that took longer than
the network.

Which classes are such norms is read from their code: transformers writes the same forward into most of its models. A
norm that is written differently is differentiated operation by operation. This file knows modules and tensors only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tangent_peft.forward.level import LinearizedPass, carries_tangent, dual, split


@dataclass(frozen=True)
class NormRule:
    """What a kind of norm does besides normalizing.

    Attributes:
        written: its methods, by name, as they are written.
        eps: ε of a module.
        tail: of a module, x̂ and the dtype of x: gain and cast, linear in x̂.
        centered: whether the mean is taken out.
    """

    written: dict[str, Callable[..., Tensor]]
    eps: Callable[[Any], float]
    tail: Callable[[Any, Tensor, torch.dtype], Tensor]
    centered: bool = False

    def tangent(self, norm: nn.Module, x: Tensor, dx: Tensor) -> Tensor:
        """ẏ (…, D) for x and ẋ (…, D); computed in float32 at least, as the norms are."""
        wide = torch.promote_types(x.dtype, torch.float32)
        c, dc = x.to(wide), dx.to(wide)
        if self.centered:
            c, dc = c - c.mean(-1, keepdim=True), dc - dc.mean(-1, keepdim=True)
        r = torch.rsqrt(c.square().mean(-1, keepdim=True) + self.eps(norm))
        normed = c * r
        inner = (normed * dc).mean(-1, keepdim=True)
        return self.tail(norm, torch.addcmul(dc, normed, inner, value=-1) * r, x.dtype)


# ---- the norms that are known, as transformers and torch write them --------------------------------------------------


def _llama(self: Any, hidden_states: Tensor) -> Tensor:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * hidden_states.to(input_dtype)


def _gpt_oss(self: Any, hidden_states: Tensor) -> Tensor:
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
    return (self.weight * hidden_states).to(input_dtype)


def _gemma(self: Any, x: Tensor) -> Any:
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)


def _gemma_norm(self: Any, x: Tensor) -> Any:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


def _layer_norm(self: Any, input: Tensor) -> Tensor:
    return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


def _layer_norm_tail(norm: Any, normed: Tensor, dtype: torch.dtype) -> Tensor:
    return normed if norm.weight is None else normed * norm.weight


_RULES = [
    NormRule({"forward": _llama}, lambda m: m.variance_epsilon, lambda m, x, dtype: m.weight * x.to(dtype)),
    NormRule({"forward": _gpt_oss}, lambda m: m.variance_epsilon, lambda m, x, dtype: (m.weight * x).to(dtype)),
    NormRule(
        {"forward": _gemma, "_norm": _gemma_norm},
        lambda m: m.eps,
        lambda m, x, dtype: (x * (1.0 + m.weight.float())).to(dtype),
    ),
    NormRule({"forward": _layer_norm}, lambda m: m.eps, _layer_norm_tail, centered=True),
]


def norm_rule(kind: type[nn.Module]) -> NormRule | None:
    """The rule of modules of a class, or `None` if its forward is written differently from all that are known."""
    code: Any = kind
    return _norm_rule(code, code.forward)


@functools.cache
def _norm_rule(kind: Any, forward: Any) -> NormRule | None:
    """The same; a forward that someone gave to the class later is another one."""
    return next((rule for rule in _RULES if _is_written_as(kind, rule)), None)


def _is_written_as(kind: type, rule: NormRule) -> bool:
    return all(_code(_method(kind, name)) == _code(method) for name, method in rule.written.items())


def _method(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


def _code(function: Any) -> Any:
    """What functions have in common that say the same, whatever they call it; `None` for what is no function."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    constants = [x for x in code.co_consts if x is not None and x != function.__doc__]
    return code.co_code, code.co_names, str(constants)


def is_norm(module: nn.Module) -> bool:
    """Whether the derivative of `module` is known in one step."""
    if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
        return False
    return norm_rule(type(module)) is not None


def derive_norms(opened: LinearizedPass) -> None:
    """Differentiates the norms of `opened.root` by their rules until the pass closes."""
    for norm in opened.structure.select(is_norm):
        own = vars(norm)
        if "forward" in own:  # someone put another one there
            continue
        rule = norm_rule(type(norm))
        if rule is not None:
            own["forward"] = functools.partial(_forward, norm, rule, norm.forward)
            opened.contexts.callback(own.pop, "forward", None)


def _forward(norm: Any, rule: NormRule, forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    if len(args) != 1 or kwargs:
        return forward(*args, **kwargs)
    x, dx = split(args[0])
    if dx is None or carries_tangent(norm.weight):
        return forward(args[0])
    y = forward(x)
    return dual(y, rule.tangent(norm, x, dx))
