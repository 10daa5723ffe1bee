"""The wrapped linear layers: `nn.Linear` and transformers' `Conv1D`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangent_peft.forward import call_within, is_sharded
from tangent_peft.tuner.layer import TangentLayer


#: Subclasses of `nn.Linear` in transformers whose own forward is W x + b all the same.
AFFINE = frozenset({"FalconLinear", "EsmFoldLinear"})


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer stores W and computes W x + b: no router, product by groups or the like that derives from one."""
    kind = type(module)
    if isinstance(module, nn.Linear):
        return kind.forward is nn.Linear.forward or kind.__name__ in AFFINE
    return isinstance(module, Conv1D) and kind.forward is Conv1D.forward


def calls_nothing_else(layer: Any) -> bool:
    """Whether a call of `layer` is W x + b and nothing else: no hook, no other forward, no sharded weight."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return not hooked and is_plain_linear(layer) and not is_sharded(layer.weight)


class TangentLinear(TangentLayer):
    """Final: a wrapped `nn.Linear`, W (out, in)."""

    def __init__(self, base_layer: nn.Linear, layer_name: str) -> None:
        super().__init__(base_layer, base_layer.in_features, base_layer.out_features, layer_name)

    def _readable_weight(self) -> Tensor | None:
        return self.base_layer.weight if calls_nothing_else(self.base_layer) else None

    def _linear_part(self, x: Tensor) -> Tensor:
        if self.base_layer.bias is None and not self.is_hooked():
            return self.base_layer(x)
        return call_within([self.base_layer], lambda x: F.linear(x, self.base_layer.weight), x)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta


class TangentConv1D(TangentLayer):
    """Final: a wrapped `transformers.pytorch_utils.Conv1D` (GPT-2), W (in, out)."""

    def __init__(self, base_layer: Conv1D, layer_name: str) -> None:
        super().__init__(base_layer, base_layer.nx, base_layer.nf, layer_name)

    def _readable_weight(self) -> Tensor | None:
        return self.base_layer.weight.mT if calls_nothing_else(self.base_layer) else None

    def _linear_part(self, x: Tensor) -> Tensor:
        return call_within([self.base_layer], lambda x: F.linear(x, self.base_layer.weight.mT), x)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta.mT
