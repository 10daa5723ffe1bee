"""The tangent ends at a loss that a model without an affine head computes of its own logits.

Where the tangent leaves through the root's output, `labels=` reach the loss while the logits are still dual:

    L(f) dual: L(f) + ⟨∇L(f), ḟ⟩     wanted: L(f + ḟ), the loss of the linearized logits

Encoders do so (RoBERTa, DeBERTa, ModernBERT, …), whose classification head has an activation in it. The losses listed
here take logits, so primal and tangent are added in front of them, exactly as in the logits that the model returns. A
loss behind anything else stays dual and is refused as the pass closes.

Only where a transformers model was given labels: anywhere else such a module may be a step of the forward, whose value
goes on through the network and has to keep its tangent.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from tangent_peft.forward.level import LinearizedPass, carries_tangent, current_pass, join, map_tensors


LOSSES = (nn.CrossEntropyLoss, nn.BCEWithLogitsLoss, nn.MSELoss)  # classification, multi-label, regression


_POSITIONS = ("start_positions", "end_positions")  # the labels of question answering
_SWITCHES = ("return_loss",)  # of models whose inputs are each other's labels


def asks_for_loss(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of `root` has labels among its arguments, by keyword or position, as transformers names them."""
    given = dict(kwargs)
    if args:
        given |= dict(zip(inspect.signature(root.forward).parameters, args, strict=False))
    return any(
        (value is not None and ("label" in name or name in _POSITIONS)) or (name in _SWITCHES and bool(value))
        for name, value in given.items()
    )


def join_at_losses(opened: LinearizedPass, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Until the pass closes, losses that the call of `opened.root` asks for are computed on primal + tangent."""
    root: Any = opened.root
    if not isinstance(root, PreTrainedModel) or not asks_for_loss(root, args, kwargs):
        return
    opened.contexts.callback(register_module_forward_pre_hook(_join_arguments).remove)
    own = vars(root).get("_loss_function")
    if own is None and root.loss_type is None:  # transformers would warn that it takes another one
        return
    root.loss_function = functools.partial(_joined, root.loss_function)
    opened.contexts.callback(_restore, root, own)


def refuse_linearized_loss(root: nn.Module, output: Any, asked: bool) -> None:
    """Refuses a loss that is still dual as it leaves `root`: the linearized loss, not that of the linearized logits.

    Args:
        root: the module whose call ends.
        output: what it returns.
        asked: whether it was called with labels; then any scalar is taken for a loss, since a tuple names none.

    Raises:
        NotImplementedError: if there is one.
    """
    scalars: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        scalars.extend([x] if x.ndim == 0 and carries_tangent(x) else [])
        return x

    if asked:
        map_tensors(output, collect)
    if scalars or (isinstance(output, dict) and carries_tangent(output.get("loss"))):
        raise NotImplementedError(
            f"{type(root).__name__} computed its loss on dual logits; that is the linearized loss, not the "
            "loss of the linearized logits. Call the model without labels and compute the loss from its logits; "
            "transformers' Trainer does with `compute_loss_func=`."
        )


def _restore(root: Any, own: Any) -> None:
    if own is None:
        del root._loss_function
    else:
        root.loss_function = own


def _join_arguments(module: nn.Module, args: Any) -> Any:
    return map_tensors(args, join) if isinstance(module, LOSSES) and current_pass() is not None else None


def _joined(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function(*map_tensors(args, join), **map_tensors(kwargs, join))
