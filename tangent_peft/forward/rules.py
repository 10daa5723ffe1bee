"""Derivatives that torch or a host library lacks, each a rule of one or two lines.

A custom `torch.autograd.Function` without a `jvp` refuses dual tensors. Where its derivative is known the rule stands
here; where it is not, `support.py` refuses the module that calls it.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tangent_peft.forward.level import LinearizedPass, dual, split


# ---- Functions of transformers' models -------------------------------------------------------------------------------


def bloom_gelu(x: Tensor) -> Tensor:
    """BLOOM's GELU (tanh form), differentiated by the host's own formula: ẏ = gelu'(x) ẋ."""
    from transformers.models.bloom import modeling_bloom

    host: Any = modeling_bloom  # whose annotations do not say that the derivative takes a tuple
    primal, tangent = split(x)
    y = host.bloom_gelu_forward(primal)
    return y if tangent is None else dual(y, host.bloom_gelu_back(tangent, (primal,)))


@dataclass(frozen=True)
class _Rule:
    """Stands in for a Function's class: callers know its `apply` only."""

    apply: Callable[..., Any]


#: The module that defines a Function, its name there, and what computes the same on dual tensors.
FUNCTIONS = {("transformers.models.bloom.modeling_bloom", "GeLUFunction"): _Rule(bloom_gelu)}


def derive_host_code(opened: LinearizedPass) -> None:
    """Puts what can be differentiated in the place of what modules of `opened.root` call, until the pass closes."""
    homes = {type(module).__module__ for module in opened.root.modules()}
    _derive_functions(opened, homes)
    _derive_kernels(opened, homes)


def _derive_functions(opened: LinearizedPass, homes: set[str]) -> None:
    for (home, name), rule in FUNCTIONS.items():
        if home in homes:
            namespace = vars(sys.modules[home])
            opened.contexts.callback(namespace.update, {name: namespace[name]})
            namespace[name] = rule


# ---- optional kernel packages ----------------------------------------------------------------------------------------

#: Functions that transformers takes from mamba-ssm, causal-conv1d and flash-linear-attention if these are installed.
#: Their kernels have no derivative, and some that change states in place would lose the tangent without a word.
KERNELS = frozenset(
    {
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "chunk_gated_delta_rule",
        "chunk_kda",
        "fused_recurrent_gated_delta_rule",
        "fused_recurrent_kda",
        "mamba_chunk_scan_combined",
        "mamba_inner_fn",
        "mamba_split_conv1d_scan_combined",
        "selective_scan_fn",
        "selective_state_update",
    }
)


def _derive_kernels(opened: LinearizedPass, homes: set[str]) -> None:
    """Puts transformers' reference implementations in their place."""
    for home in homes:
        if not home.startswith("transformers.models."):
            continue
        namespace = vars(sys.modules[home])
        for name in KERNELS & namespace.keys():
            opened.contexts.callback(namespace.update, {name: namespace[name]})
            namespace[name] = inspect.unwrap(namespace[name])
