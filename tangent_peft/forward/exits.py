"""Where the tangent ends.

It ends at the model's head: what follows (soft-cap, temperature, loss, sampling) must see plain linearized logits, or
`outputs.loss` would be the linearized loss instead of the loss of the linearized logits. Three places are exact:

* the output of the head, when the head itself carries a tangent: (W h + b) + (W dh + Δ h);
* the input of a head that carries none, since W (h + dh) + b is the same number without a second vocabulary-sized
  product; when nothing learned lies between backbone and head this is the backbone's output, which also serves heads
  that read the backbone's output and `head.weight` themselves;
* the output of the root for a module without a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class TangentExit:
    """The module at which the tangent ends, and on which side of it."""

    module: nn.Module
    side: Literal["input", "output"]


def find_head(root: nn.Module) -> nn.Module | None:
    """The affine output layer of a transformers model: its output embeddings, or its only other child.

    Returns `None` for a backbone, for a module that is not a transformers model, and for a head of several layers.
    """
    if not isinstance(root, PreTrainedModel):
        return None
    head = root.get_output_embeddings()
    if head is not None:
        return head
    if root.base_model is root:
        return None
    others = [child for child in root.children() if child is not root.base_model and _has_parameters(child)]
    return others[0] if len(others) == 1 and _is_affine(others[0]) else None


def find_exit(root: nn.Module, carriers: set[nn.Module]) -> TangentExit:
    """Chooses the exit of `root`, of which the modules in `carriers` may carry a tangent."""
    head = find_head(root)
    if head is None:
        return TangentExit(root, "output")
    if head in carriers:
        return TangentExit(head, "output")
    learned = [child for child in root.children() if _has_parameters(child)]
    if isinstance(root, PreTrainedModel) and set(learned) == {root.base_model, head}:
        return TangentExit(root.base_model, "output")
    return TangentExit(head, "input")


_WRAPPED = ("base_layer", "original_module")  # where PEFT's wrappers of a layer, or of its copies, keep it


def _is_affine(module: nn.Module) -> bool:
    """One linear layer, possibly inside PEFT's wrappers; several have an activation between them, seen or not."""
    inside = next((child for name, child in module.named_children() if name in _WRAPPED), None)
    return isinstance(module, nn.Linear) if inside is None else _is_affine(inside)


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
