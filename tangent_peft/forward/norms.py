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
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tangent_peft.forward.level import LinearizedPass, carries_tangent, dual, split


@dataclass(frozen=True)
class NormRule:
    """What a kind of norm does besides normalizing.

    Attributes:
        eps: ε of a module.
        tail: of a module, x̂ and the dtype of x: gain and cast, linear in x̂.
        centered: whether the mean is taken out.
    """

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


def _layer_norm_tail(norm: Any, normed: Tensor, dtype: torch.dtype) -> Tensor:
    return normed if norm.weight is None else normed * norm.weight


def _same_code(function: Any) -> Any:
    """What two functions have in common that were written with the same words; `None` for what is none."""
    if not isinstance(function, FunctionType):
        return None
    code = function.__code__
    constants = [x for x in code.co_consts if x != function.__doc__]
    return code.co_code, code.co_names, str(constants)


_RULES = [
    (LlamaRMSNorm, NormRule(lambda m: m.variance_epsilon, lambda m, x, dtype: m.weight * x.to(dtype))),
    (GptOssRMSNorm, NormRule(lambda m: m.variance_epsilon, lambda m, x, dtype: (m.weight * x).to(dtype))),
    (GemmaRMSNorm, NormRule(lambda m: m.eps, lambda m, x, dtype: (x * (1.0 + m.weight.float())).to(dtype))),
    (nn.LayerNorm, NormRule(lambda m: m.eps, _layer_norm_tail, centered=True)),
]


def norm_rule(kind: type[nn.Module]) -> NormRule | None:
    """The rule of modules of a class, or `None` if its forward is written differently from all that are known."""
    code: Any = kind
    return _norm_rule(code, code.forward)


@functools.cache
def _norm_rule(kind: Any, forward: Any) -> NormRule | None:
    """The same; a forward that someone gave to the class later is another one."""
    for known, rule in _RULES:
        parts = ["forward", *(["_norm"] if "_norm" in vars(known) else [])]
        if all(_same_code(_method(kind, part)) == _same_code(_method(known, part)) for part in parts):
            return rule
    return None


def _method(kind: type, name: str) -> Any:
    return next((vars(base)[name] for base in kind.__mro__ if name in vars(base)), None)


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
