"""The tangent ends at a loss that a model without an affine head computes of its own logits.

Where the tangent leaves through the root's output, `labels=` reach the loss while the logits are still dual:

    L(f) dual: L(f) + ⟨∇L(f), ḟ⟩     wanted: L(f + ḟ), the loss of the linearized logits

Encoders do so (RoBERTa, DeBERTa, ModernBERT, …), whose classification head has an activation in it. The losses listed
here take logits, so primal and tangent are added in front of them, exactly as in the logits that the model returns. A
loss behind anything else stays dual and is refused as the pass closes.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tangent_peft.forward.level import LinearizedPass, current_pass, join, map_tensors


LOSSES = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss)  # classification, multi-label, regression


def join_at_losses(opened: LinearizedPass) -> None:
    """Until the pass closes, losses of `opened.root` are computed on primal + tangent."""
    opened.contexts.callback(register_module_forward_pre_hook(_join_arguments).remove)
    root: Any = opened.root
    if not isinstance(root, PreTrainedModel):
        return
    own = vars(root).get("_loss_function")
    if own is None and root.loss_type is None:  # transformers would warn that it takes another one
        return
    root.loss_function = functools.partial(_joined, root.loss_function)
    opened.contexts.callback(_restore, root, own)


def _restore(root: Any, own: Any) -> None:
    if own is None:
        del root._loss_function
    else:
        root.loss_function = own


def _join_arguments(module: nn.Module, args: Any) -> Any:
    return map_tensors(args, join) if isinstance(module, LOSSES) and current_pass() is not None else None


def _joined(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*map_tensors(args, join), **map_tensors(kwargs, join))
