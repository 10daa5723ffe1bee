"""Derivatives that torch or a host library lacks, each a rule of one or two lines.

A custom `torch.autograd.Function` without a `jvp` refuses dual tensors. Where its derivative is known the rule stands
here; where it is not, `support.py` refuses the module that calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tangent_peft.forward.level import LinearizedPass, dual, split


# ---- Functions of transformers' models -------------------------------------------------------------------------------


def bloom_gelu(x: Tensor) -> Tensor:
    """BLOOM's GELU (tanh form), differentiated by the host's own formula: ẏ = gelu'(x) ẋ."""
    from transformers.models.bloom import modeling_bloom as host

    primal, tangent = split(x)
    y = host.bloom_gelu_forward(primal)
    return y if tangent is None else dual(y, host.bloom_gelu_back(tangent, (primal,)))


@dataclass(frozen=True)
class _Rule:
    """Stands in for a Function's class: callers know its `apply` only."""

    apply: Callable[..., Any]


#: The module that defines a Function, its name there, and what computes the same on dual tensors.
FUNCTIONS = {("transformers.models.bloom.modeling_bloom", "GeLUFunction"): _Rule(bloom_gelu)}


def derive_functions(opened: LinearizedPass) -> None:
    """Puts the rules in the place of the Functions that modules of `opened.root` call, until the pass closes."""
    homes = {type(module).__module__ for module in opened.root.modules()}
    for (home, name), rule in FUNCTIONS.items():
        if home in homes:
            namespace = vars(sys.modules[home])
            opened.contexts.callback(namespace.update, {name: namespace[name]})
            namespace[name] = rule
