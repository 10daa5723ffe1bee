"""Derivatives that torch or a host library lacks, each a rule of one or two lines.

A custom `torch.autograd.Function` without a `jvp` refuses dual tensors. Where its derivative is known the rule stands
here; where it is not, `support.py` refuses the module that calls it.

Engines. Sharding engines hang their work on tensors that pass a module. A dual tensor passes it as well, and its
tangent, along which autograd will come back, has to take the engine's hook with it, or the engine never learns that the
module's backward began (it gathers the weights) or ended (it frees them and reduces the gradients).

* DeepSpeed ZeRO-3 sends them through identity Functions without a `jvp`. The derivative of an identity is the identity:
  the same Function, applied to the tangent, whose backward then fires.
* Its `F.linear`, installed by `deepspeed.zero.Init`, is a Function without a `jvp` as well: y = W x + b gives ẏ = W ẋ.
* FSDP2 hooks what enters and leaves a module and requires a gradient, and looks at primals only, which never do.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_peft.forward.level import LinearizedPass, dual, map_tensors, split
from tangent_peft.forward.sharding import has_zero3_hooks, is_fsdp_module


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
    homes = opened.structure.homes
    _derive_functions(opened, homes)
    _derive_kernels(opened, homes)


def _derive_functions(opened: LinearizedPass, homes: Set[str]) -> None:
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


def _derive_kernels(opened: LinearizedPass, homes: Set[str]) -> None:
    """Puts transformers' reference implementations in their place."""
    for home in homes:
        if not home.startswith("transformers.models."):
            continue
        namespace = vars(sys.modules[home])
        for name in KERNELS & namespace.keys():
            opened.contexts.callback(namespace.update, {name: namespace[name]})
            namespace[name] = inspect.unwrap(namespace[name])


# ---- engines ---------------------------------------------------------------------------------------------------------


def carry_through_engines(opened: LinearizedPass) -> None:
    """Lets tangents pass the hooks of the engine that shards `opened.root`, if there is one, until the pass closes."""
    if has_zero3_hooks(opened.root):
        for module in opened.structure.modules:
            for name in _ZERO3_FUNCTIONS:
                if name in vars(module):
                    _give_identity_jvp(vars(module)[name])
        linear = sys.modules.get("deepspeed.runtime.zero.linear")
        if linear is not None:
            _give_linear_jvp(vars(linear)["LinearFunctionForZeroStage3"])
    for module in opened.structure.select(is_fsdp_module):
        opened.contexts.callback(module.register_forward_pre_hook(_hook_entering, with_kwargs=True).remove)
        opened.contexts.callback(module.register_forward_hook(_hook_leaving).remove)


_ZERO3_FUNCTIONS = ("pre_bwd_fn", "post_bwd_fn")


def _give_identity_jvp(function: Any) -> None:
    """Gives an identity Function, which counts how often its backward is to come, its derivative: itself."""
    if "jvp" not in vars(function):

        def jvp(ctx: Any, tangent: Tensor) -> Tensor:
            return function.apply(tangent) if tangent.requires_grad else tangent.view_as(tangent)

        function.jvp = staticmethod(jvp)


def _give_linear_jvp(function: Any) -> None:
    """Gives (x, W, b) ↦ W x + b the derivative W ẋ; it is used for frozen weights only."""
    if "jvp" in vars(function):
        return
    before = function.setup_context

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        before(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)  # the tangents of what has none are then None, not zeros

    def jvp(ctx: Any, tangent: Tensor | None, *frozen: Tensor | None) -> Tensor:
        if tangent is None or any(t is not None for t in frozen):
            raise NotImplementedError("ZeRO-3's linear Function has a derivative in its input only.")
        (weight,) = ctx.saved_tensors
        return function.apply(tangent, weight)

    function.setup_context, function.jvp = staticmethod(setup_context), staticmethod(jvp)


def _hook_entering(module: Any, args: Any, kwargs: Any) -> Any:
    """Does to tangents what FSDP2 does to inputs that require a gradient: frees the weights as autograd has passed."""
    given = [split(x) for x in _with_tangents_that_train((args, kwargs))]
    if not torch.is_grad_enabled() or not given:
        return None
    passed: Any = tuple(tangent for _, tangent in given)
    groups = vars(sys.modules["torch.distributed.fsdp._fully_shard._fsdp_param_group"])
    for group in module._get_fsdp_state()._fsdp_param_groups:
        passed = groups["RegisterPostBackwardFunction"].apply(group, *passed)
    hooked = iter([dual(primal, tangent) for (primal, _), tangent in zip(given, passed, strict=True)])
    return map_tensors((args, kwargs), lambda x: next(hooked) if _tangent_trains(x) else x)


def _tangent_trains(x: Tensor) -> bool:
    _, tangent = split(x)
    return tangent is not None and tangent.requires_grad


def _with_tangents_that_train(tree: Any) -> list[Tensor]:
    """The tensors in a tree along whose tangents autograd will come back."""
    found: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        if _tangent_trains(x):
            found.append(x)
        return x

    map_tensors(tree, collect)
    return found


def _hook_leaving(module: Any, args: Any, output: Any) -> None:
    """Does to tangents what FSDP2 does to outputs that require a gradient: gathers the weights when autograd comes."""
    if not torch.is_grad_enabled():
        return
    for x in _with_tangents_that_train(output):
        tangent: Any = split(x)[1]
        tangent.register_hook(module._get_fsdp_state()._pre_backward)
