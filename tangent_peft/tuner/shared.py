"""Weights that several layers share: a tangent at one of them is not one of the others."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from tangent_peft.tuner.layer import TangentLayer


def refuse_shared_weights(model: nn.Module) -> None:
    """Refuses a tangent at a weight that others use as well, other than an embedding and the head tied to it.

    In the linearized model the others would keep W, as the weight of a tied head does. But merging changes W for all
    of them, and only for head and embedding is it untied first.

    Args:
        model: the model that was wrapped.

    Raises:
        NotImplementedError: naming the layer and who shares its weight, and how to leave it out.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for weight in module._parameters.values():
            if weight is not None:
                owners.setdefault(id(weight), []).append(name)
    head: Any = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for path, layer in model.named_modules():
        if not isinstance(layer, TangentLayer) or (layer is head and layer.tangent_tied):
            continue
        weight = layer.get_base_layer()._parameters.get("weight")
        if weight is None:
            continue
        others = [name for name in owners[id(weight)] if not f"{name}.".startswith(f"{path}.")]
        others = [name.removesuffix(".base_layer") for name in others]
        tied = layer.tangent_tied and all(model.get_submodule(name) is head for name in others)
        if others and not tied:
            raise NotImplementedError(
                f"{type(model).__name__} can not be linearized exactly: layer {path!r} shares its weight with "
                f"{others}, and its tangent would be a tangent of these as well. Leave it out of `target_modules`, or "
                f"add '{path.rsplit('.', 1)[-1]}' to `exclude_modules`."
            )
