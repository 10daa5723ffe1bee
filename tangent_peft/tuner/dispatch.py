"""Which layer class wraps which module, and the refusal of those that can carry no tangent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from tangent_peft.tuner.backends import quantization_backend, refuse_unknown
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.linear import TangentConv1D, TangentLinear
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
    if isinstance(base_layer, nn.Linear):
        return TangentLinear(base_layer, layer_name)
    if isinstance(base_layer, Conv1D):
        return TangentConv1D(base_layer, layer_name)
    raise TypeError(
        f"Module {layer_name!r} is a {type(base_layer).__name__}; a tangent can be carried by torch.nn.Linear and "
        "transformers' Conv1D. Take it out of `target_modules`, or add it to `exclude_modules`."
    )
