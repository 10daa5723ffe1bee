"""A weight that may be looked at but not computed with: a head's or a packed one that carries a tangent, during a pass.

Code that multiplies by `lm_head.weight` itself, instead of calling the head, would lose the tangent. Reading its dtype
or device, as Mamba does, loses nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


_HARMLESS = {
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.layout.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
}


class WeightRead(RuntimeError):
    """Something computed with a guarded weight."""


class GuardedWeight(Tensor):
    """Tells its dtype, device and shape; any operation on it raises `WeightRead` with `refusal`."""

    refusal: str

    @staticmethod
    def of(weight: Tensor, refusal: str) -> GuardedWeight:
        """A guarded view of `weight`; of a tensor of another class, such as torchao's, one without its numbers."""
        plain = weight.detach()
        if type(plain) is not Tensor:
            plain = torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        guarded = plain.as_subclass(GuardedWeight)
        guarded.refusal = refusal
        return guarded

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answers what is harmless."""
        if func in _HARMLESS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise WeightRead(next(x.refusal for x in _leaves(args, kwargs) if isinstance(x, GuardedWeight)))


def _leaves(*trees: Any) -> Any:
    for tree in trees:
        if isinstance(tree, (tuple, list)):
            yield from _leaves(*tree)
        elif isinstance(tree, dict):
            yield from _leaves(*tree.values())
        else:
            yield tree
