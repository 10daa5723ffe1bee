"""Which layer class wraps which module, and the refusal of those that can carry no tangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tangent_peft.tuner.backends import quantization_backend, refuse_unknown
from tangent_peft.tuner.embedding import TangentEmbedding
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.linear import TangentConv1D, TangentLinear, is_plain_linear
from tangent_peft.tuner.quantized import TangentQuantized


def wrap_layer(base_layer: nn.Module, layer_name: str, requantize: Callable[[], Any] | None = None) -> TangentLayer:
    """The tangent layer for a base layer; `requantize` is how a torchao layer is packed again after merging.

    Raises:
        TypeError: if layers of this type can not carry a tangent.
    """
    backend = quantization_backend(base_layer, requantize)
    if backend is not None:
        return TangentQuantized(base_layer, layer_name, backend)
    refuse_unknown(base_layer, layer_name)
    if isinstance(base_layer, (nn.Linear, Conv1D)) and not is_plain_linear(base_layer):
        raise TypeError(
            f"Module {layer_name!r} is a {type(base_layer).__name__}, which derives from a linear layer but has a "
            "forward of its own, so its tangent might not be exact. Take it out of `target_modules`, or add it to "
            "`exclude_modules`: tangents from below pass through it."
        )
    if isinstance(base_layer, nn.Linear):
        return TangentLinear(base_layer, layer_name)
    if isinstance(base_layer, Conv1D):
        return TangentConv1D(base_layer, layer_name)
    if isinstance(base_layer, nn.Embedding):
        return TangentEmbedding(base_layer, layer_name)
    raise TypeError(
        f"Module {layer_name!r} is a {type(base_layer).__name__}; a tangent can be carried by torch.nn.Linear, "
        "transformers' Conv1D and torch.nn.Embedding. Take it out of `target_modules`, or add it to `exclude_modules`; "
        "the fused weights of experts are named in `target_parameters`."
    )
