"""Derivatives that torch or a host library lacks.

Engines. Sharding engines hang their work on tensors that pass a module. A dual tensor passes it as well, and its
tangent, along which autograd will come back, has to take the engine's hook with it, or the engine never learns that the
module's backward began (it gathers the weights) or ended (it frees them and reduces the gradients).

* DeepSpeed ZeRO-3 sends them through identity Functions without a `jvp`. The derivative of an identity is the identity:
  the same Function, applied to the tangent, whose backward then fires.
* Its `F.linear`, installed by `deepspeed.zero.Init`, is a Function without a `jvp` as well: y = W x + b gives ẏ = W ẋ.
* FSDP2 hooks the outputs of a module that require a gradient, and looks at primals only, which never do.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from tangent_peft.forward.level import LinearizedPass, map_tensors, split
from tangent_peft.forward.sharding import fsdp_modules


# ---- engines ---------------------------------------------------------------------------------------------------------


def carry_through_engines(opened: LinearizedPass) -> None:
    """Lets tangents pass the hooks of the engine that shards `opened.root`, if there is one, until the pass closes."""
    if "pre_bwd_fn" in vars(opened.root):  # DeepSpeed gives each module two Functions of its own
        for module in opened.root.modules():
            for name in _ZERO3_FUNCTIONS:
                if name in vars(module):
                    _give_identity_jvp(vars(module)[name])
        linear = sys.modules.get("deepspeed.runtime.zero.linear")
        if linear is not None:
            _give_linear_jvp(vars(linear)["LinearFunctionForZeroStage3"])
    for module in fsdp_modules(opened.root):
        opened.contexts.callback(module.register_forward_hook(_hook_tangents).remove)


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


def _hook_tangents(module: Any, args: Any, output: Any) -> None:
    """Does to tangents what FSDP2 does to outputs that require a gradient: gathers the weights when autograd comes."""
    if not torch.is_grad_enabled():
        return
    state = module._get_fsdp_state()

    def hook(x: Tensor) -> Tensor:
        _, tangent = split(x)
        if tangent is not None and tangent.requires_grad:
            tangent.register_hook(state._pre_backward)
        return x

    map_tensors(output, hook)
