"""Fused expert weights (E, …) as carriers: a tangent per expert, for parameters named by `target_parameters`.

Such a parameter belongs to a module that reads it in the middle of its forward: `TangentExperts` calls that module with
the dual (W, ΔW) in the parameter's place. Whatever the module does with it, operation by operation, is then exact. ΔW
is formed in full while the module runs, also of a low rank.

The parameters of one module have one wrapper each, always all of them and in the module's order, so that the names in
a saved axis do not depend on which parameters it has tangents for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from tangent_peft.forward import current_pass, is_replaying
from tangent_peft.tuner.layer import TangentLayer


_standing_in = threading.RLock()  # held while a module has something else in its parameter's place


class TangentExperts(TangentLayer):
    """Final: a module of which one parameter (E, out, in) carries a tangent; nested, one for each such parameter.

    Args:
        base_layer: the module, or the wrapper of another of its parameters.
        parameter_name: name of the parameter in it.
        layer_name: full name of the parameter in the unmodified model.
    """

    def __init__(self, base_layer: nn.Module, parameter_name: str, layer_name: str) -> None:
        owner = base_layer.get_base_layer() if isinstance(base_layer, TangentExperts) else base_layer
        experts, *sizes = owner.get_parameter(parameter_name).shape
        self.transposed = inputs_first(owner)
        in_features, out_features = sizes if self.transposed else sizes[::-1]
        super().__init__(base_layer, in_features, out_features, layer_name, leading=(experts,))
        self.parameter_name = parameter_name

    @property
    def weight_name(self) -> str:
        """Full name of the parameter in the unmodified model."""
        return self.layer_name

    def parameter(self) -> nn.Parameter:
        """W (E, out, in), or (E, in, out), as the module stores it."""
        owner: nn.Module = self.get_base_layer()
        weight = owner._parameters[self.parameter_name]
        assert weight is not None
        return weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module with the dual (W, Σ λᵢ τᵢ) in the parameter's place.

        Raises:
            RuntimeError: if the axes are linearized but no pass is open.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        carried = self.carried_axes()
        if not carried:
            return self.base_layer(*args, **kwargs)
        if self._linearized(carried) and not is_replaying() and current_pass() is None:
            raise RuntimeError(self._called_outside(carried))
        with self._in_place():
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        """Puts `carried_weight` before the parameter, as late as the module's own hooks have made that one ready."""
        owner: nn.Module = self.get_base_layer()

        def stand_in(module: nn.Module, args: Any) -> None:
            vars(module)[self.parameter_name] = self.carried_weight(self.parameter())

        with _standing_in:
            handle = owner.register_forward_pre_hook(stand_in)
            try:
                yield
            finally:
                handle.remove()
                vars(owner).pop(self.parameter_name, None)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta.mT if self.transposed else delta

    def get_base_weight(self) -> Tensor:
        """W as the module stores it."""
        return self.parameter().data

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Replaces W."""
        self.parameter().data = weight_data

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module itself, with the tangents of all its parameters in the weights if `merge`; called by PEFT."""
        layer: nn.Module = self
        while isinstance(layer, TangentExperts):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.parameter().device, self.parameter().dtype


def inputs_first(owner: nn.Module) -> bool:
    """Whether the experts of a module are stored as (E, in, out); transformers notes that where it dispatches them."""
    return bool(vars(owner).get("is_transposed", isinstance(owner, Llama4TextExperts)))


def fused_parameters(owner: nn.Module) -> list[str]:
    """Names of the parameters in a module that could carry a tangent per expert: floating and three-dimensional."""
    if isinstance(owner, (_ConvNd, TangentLayer)):
        return []
    return [n for n, p in owner.named_parameters(recurse=False) if p.ndim == 3 and p.is_floating_point()]


def wrap_experts(owner: nn.Module, owner_name: str) -> TangentExperts:
    """Wraps all fused parameters of a module, the first one innermost."""
    layer = owner
    for name in fused_parameters(owner):
        layer = TangentExperts(layer, name, f"{owner_name}.{name}")
    assert isinstance(layer, TangentExperts)
    return layer


def wrapper_of(layer: nn.Module, parameter_name: str) -> TangentExperts:
    """The one among nested wrappers that holds the tangents of a parameter."""
    while isinstance(layer, TangentExperts) and layer.parameter_name != parameter_name:
        layer = layer.base_layer
    assert isinstance(layer, TangentExperts)
    return layer
