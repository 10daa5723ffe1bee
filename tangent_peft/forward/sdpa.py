"""The derivative of `F.scaled_dot_product_attention` where a model calls it itself, past transformers' interface.

Falcon does, modules that are no transformers models, and models whose code comes with their weights. PyTorch has a
forward derivative for its slow backend only, and the gradient of that one is NaN where a query sees no key, as in left
padding (its softmax divides zero by zero). So while a linearized pass is open, the call is answered here: the primal by
PyTorch's own kernel, the tangent by `attention_rule.py`.

`nn.MultiheadAttention` calls it from inside a torch function, where modes are off. It is asked for its weights instead,
which it computes by plain operations that differentiate themselves, and the weights are dropped.

Seam: a `TorchFunctionMode`, entered for the models that need it only, since every torch call then passes through it.
Letters: B batch, T queries, S keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tangent_peft.forward.attention_rule import AttentionShape, AttentionTangent, tangent_by_chunks
from tangent_peft.forward.flash import can_flash, flash_tangent
from tangent_peft.forward.level import autocast_dtype, carries_tangent, dual, split


class SdpaDerivative(TorchFunctionMode):
    """While entered, `F.scaled_dot_product_attention` of dual tensors is differentiated by our own rule."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func`, or the rule if it is attention on dual tensors."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and any(map(carries_tangent, (*args, *kwargs.values()))):
            return _attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            return _multi_head_attention(*args, **kwargs)
        return func(*args, **kwargs)


_MULTI_HEAD = inspect.signature(F.multi_head_attention_forward)


def _multi_head_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` by plain operations where anything in it carries a tangent."""
    given = _MULTI_HEAD.bind(*args, **kwargs)
    asked = given.arguments.get("need_weights", True)
    if any(map(carries_tangent, given.arguments.values())):
        given.arguments["need_weights"] = True
    out, weights = F.multi_head_attention_forward(*given.args, **given.kwargs)
    return out, weights if asked else None


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor:
    """Dual attention (B, H, T, E) in the signature of `F.scaled_dot_product_attention`; K divides H."""
    scale: float | None = options.get("scale")
    if dropout_p > 0:
        raise ValueError(
            f"Attention dropout {dropout_p} in a linearized forward: the kernel does not tell which weights it "
            "dropped, so value and derivative would disagree. Set the attention dropout of the config to 0 or call "
            "`model.eval()`."
        )
    if query.ndim != 4 or carries_tangent(attn_mask):
        raise NotImplementedError(
            f"scaled_dot_product_attention got a query of shape {tuple(query.shape)} and a mask that "
            f"{'carries a' if carries_tangent(attn_mask) else 'has no'} tangent; its derivative is implemented for "
            "(B, H, T, E) and a fixed mask. Load the model with attn_implementation='eager', or write the attention "
            "of a module of your own as softmax(QKᵀ)V."
        )
    (q, dq), (k, dk), (v, dv) = split(query), split(key), split(value)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, **options)
    mask = None if attn_mask is None else attn_mask.view(*(1,) * (4 - attn_mask.ndim), *attn_mask.shape)
    shape = AttentionShape(scale=q.shape[-1] ** -0.5 if scale is None else scale, causal=is_causal)
    return dual(out, attention_tangent((q, k, v, out), (dq, dk, dv), mask, None, shape))


def attention_tangent(
    primals: tuple[Tensor, ...],
    tangents: tuple[Tensor | None, ...],
    mask: Tensor | None,
    sinks: Tensor | None,
    shape: AttentionShape,
) -> Tensor:
    """dO (B, H, T, E) for primals (Q, K, V, O) and tangents (dQ, dK, dV), by the form of the rule that fits.

    It is computed in the dtype in which the fused kernels run: autocast's, where it is on.
    """
    device = primals[0].device.type
    dtype = autocast_dtype(device) or primals[0].dtype
    tangents = tuple(None if t is None else t.to(dtype) for t in tangents)
    primals = tuple(x.to(dtype) for x in primals)
    recorded = torch.is_grad_enabled()
    if not (recorded and any(x.requires_grad for x in primals)):
        if can_flash(primals[0], primals[2]):
            return flash_tangent(primals, tangents, mask, sinks, shape)
        if recorded:
            return AttentionTangent.apply(*primals, *tangents, mask, sinks, shape)
    # Nothing is recorded; or a weight below the tangent trains as well: its gradient passes through the primal, so
    # autograd records all.
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        return tangent_by_chunks(primals, tangents, mask, sinks, shape)
