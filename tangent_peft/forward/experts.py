"""The derivative of transformers' fused experts: the grouped matrix product, bilinear in tokens and weights.

A mixture of experts keeps the weights of all experts in one tensor (E, …) and multiplies the tokens, sorted by expert,
with it in groups: y_s = x_s · W_e(s). PyTorch has no forward derivative for that product. It is bilinear, so

    dy_s = dx_s · W_e(s) + x_s · dW_e(s)        two products of the same kind

and autograd records these two for the gradient. The primal stays the user's own call. Which experts a token goes to is
an integer, locally constant; the routing weights, a softmax of dual logits, carry their tangents by themselves.

Seam: `ALL_EXPERTS_FUNCTIONS`, by the name in the config. "eager" and "batched_mm" are plain operations, which
differentiate themselves; "grouped_mm" is sent through `tangent_experts`; the other kernels are opaque.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from tangent_peft.forward.level import LinearizedPass, dual, split


NAME = "tangent_grouped_mm"
GROUPED = "grouped_mm"
PLAIN = ("eager", "batched_mm")  # made of operations that have a derivative
_MARK = "_is_expert_parallel"  # an attribute that transformers gives to every module whose experts it dispatches
_PRODUCTS = (torch._grouped_mm, torch.ops.transformers.grouped_mm_fallback)


def is_fused_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches the forward of this module to an implementation of experts."""
    return _MARK in vars(module)


def check_experts(modules: Iterable[nn.Module]) -> None:
    """Refuses an implementation of experts whose derivative is unknown.

    Raises:
        NotImplementedError: naming the implementation, and what to set instead.
    """
    for module in modules:
        if not is_fused_experts(module):
            continue
        if isinstance(module, FP8Experts):
            raise NotImplementedError(
                f"The experts {type(module).__name__} hold FP8 weights and multiply by them "
                "in a kernel without a derivative. Load the model dequantized, "
                "`FineGrainedFP8Config(dequantize=True)`."
            )
        config: Any = module.config
        chosen = config._experts_implementation
        if chosen not in (None, *PLAIN, GROUPED, NAME):
            raise NotImplementedError(
                f"The experts {type(module).__name__} run on the kernel {chosen!r}, which "
                "has no derivative, so a linearized forward can not pass through them. Call "
                f"`model.set_experts_implementation({GROUPED!r})`, or 'batched_mm' or 'eager', before you wrap it."
            )


def derive_experts(opened: LinearizedPass) -> None:
    """Dispatches the grouped experts of `opened.root` to `tangent_experts` until the pass closes.

    Raises:
        NotImplementedError: for an implementation without a derivative.
    """
    experts = opened.structure.select(is_fused_experts)
    check_experts(experts)
    configs: dict[int, Any] = {id(module.config): module.config for module in experts}
    for config in configs.values():
        if config._experts_implementation == GROUPED:
            config._experts_implementation_internal = NAME
            opened.contexts.callback(_restore, config)


def _restore(config: Any) -> None:
    config._experts_implementation_internal = GROUPED


def tangent_experts(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The experts' grouped implementation, whose products carry tangents.

    Args:
        module: the experts.
        *args: what transformers' implementations take: hidden states (S, D), chosen experts (S, k), their weights
            (S, k), possibly dual.
        **kwargs: the same by name.

    Returns:
        The dual output (S, D); its primal is the implementation's own.
    """
    with _DerivedProducts():
        return ALL_EXPERTS_FUNCTIONS[GROUPED](module, *args, **kwargs)


class _DerivedProducts(TorchFunctionMode):
    """Gives the grouped product its derivative, inside a `with` block of one thread."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            return grouped_product(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def grouped_product(product: Callable[..., Tensor], x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """y of `product(x, weight, …)` with dy = product(dx, weight) + product(x, dweight).

    Args:
        product: the grouped product, called with primals and with tangents in their place.
        x: (S, in), sorted by expert, possibly dual.
        weight: (E, in, out), possibly dual.
        *args: what else it takes: the end of each expert's rows (E,).
        **kwargs: the same by name.
    """
    (x, dx), (weight, dw) = split(x), split(weight)
    y = product(x, weight, *args, **kwargs)
    dy = None
    if dx is not None:
        dy = product(dx.to(x.dtype).contiguous(), weight, *args, **kwargs)
    if dw is not None:
        term = product(x, _laid_out_as(dw.to(weight.dtype), weight), *args, **kwargs)
        dy = term if dy is None else dy + term
    return dual(y, dy)


def _laid_out_as(tangent: Tensor, weight: Tensor) -> Tensor:
    """The tangent in memory as the weight: the kernels want one of the two inner dimensions contiguous."""
    if weight.stride(-1) == 1:
        return tangent.contiguous()
    return tangent.mT.contiguous().mT


ALL_EXPERTS_FUNCTIONS.register(NAME, tangent_experts)
