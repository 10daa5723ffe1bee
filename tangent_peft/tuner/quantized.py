"""The wrapped quantized linear layer: its weight stays packed, the tangent is an ordinary matrix beside it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import _get_in_out_features, check_adapters_to_merge
from peft.utils.quantization_utils import Bnb4bitBackend, HqqBackend, QuantizationBackend
from torch import Tensor, nn

from tangent_peft.forward import OpaqueLinear, current_pass, is_replaying
from tangent_peft.tuner.backends import prepare_quantized, reader
from tangent_peft.tuner.guard import GuardedWeight
from tangent_peft.tuner.layer import TangentLayer


class TangentQuantized(TangentLayer):
    """Final: a wrapped quantized layer, y = Ŵ x + b with Ŵ the dequantized weight.

    Calls of the base layer get their derivatives from `forward/opaque.py`, whether it is wrapped or not.
    """

    def __init__(self, base_layer: nn.Module, layer_name: str, backend: QuantizationBackend) -> None:
        sizes = _get_in_out_features(base_layer)
        if sizes[0] is None or sizes[1] is None:
            raise TypeError(
                f"Module {layer_name!r}, a {type(base_layer).__name__}, does not say how long its input and output "
                "are. Take it out of `target_modules`."
            )
        super().__init__(base_layer, sizes[0], sizes[1], layer_name)
        prepare_quantized(base_layer, layer_name, backend)
        self.quantization_backend = backend
        self.opaque = OpaqueLinear(base_layer, layer_name, reader(base_layer, backend), self.in_features)
        self._kept: tuple[nn.Module, dict[str, Any]] | None = None  # the layer as it was before merging

    def _apply_base(
        self, primal: Tensor, tangent: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if tangent is None or isinstance(self.quantization_backend, (Bnb4bitBackend, HqqBackend)):
            return super()._apply_base(primal, tangent, *args, **kwargs)
        # This kernel may round its input: the tangent has another way.
        return self.base_layer(primal, *args, **kwargs), self._linear_part(tangent)

    def is_hooked(self) -> bool:
        """Whether there are other hooks on the base layer than those of its derivative."""
        hooks = vars(self.get_base_layer())
        return max(len(hooks["_forward_hooks"]), len(hooks["_forward_pre_hooks"])) > 1

    @property
    def weight(self) -> Tensor:
        """The packed weight; where the layer carries an axis it tells its dtype, device and shape, and no more."""
        weight, carried = super(TangentLayer, self).weight, self.carried_axes()
        if not carried or (self._linearized(carried) and current_pass() is None and not is_replaying()):
            return weight
        return GuardedWeight.of(
            weight,
            f"Something reads the packed weight of {self.layer_name!r} ({type(self.get_base_layer()).__name__}) "
            f"instead of calling it, so the tangent of axes {carried} would be lost. Leave that layer out with "
            f"`exclude_modules=['{self.layer_name.rpartition('.')[2]}']`, or load the base unquantized.",
        )

    def _linear_part(self, x: Tensor) -> Tensor:
        return self.opaque.linear_part(x)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta

    # ---- merging -----------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Quantizes Ŵ + Σ λᵢ τᵢ anew, once for all adapters; `unmerge` brings the very layer back that was there.

        Raises:
            ValueError: if the backend can not quantize a weight again, or, with `safe_merge`, if the sum is not finite.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tangent_r]
        if not names:
            return
        if self.quantization_backend is None or not self.quantization_backend.supports_merge:
            raise ValueError(_NOT_AGAIN.format(self.layer_name, vars(self.quantization_backend).get("backend_name")))
        base = self.get_base_layer()
        kept = _snapshot(base) if self._kept is None else self._kept
        if self._kept is not None:
            _restore(self, *kept)
        scales = {**self.tangent_merged, **{name: self.tangent_live.uniform(name) for name in names}}
        merged = self.updated_weight(scales)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapters {names} seem to be broken")
        self._kept = kept
        with torch.no_grad():
            self.set_base_weight(merged.detach())
        _restore_attributes(*kept)
        self.merged_adapters.extend(names)
        self.tangent_merged.update({name: scales[name] for name in names})
        self.tangent_live.merged.add(self.layer_name)

    def unmerge(self) -> None:
        """Puts the layer back that was there before merging, bit for bit."""
        if self._kept is None:
            super().unmerge()  # warns that there is nothing to do
            return
        _restore(self, *self._kept)
        self._kept = None
        self.merged_adapters.clear()
        self.tangent_merged.clear()
        self.tangent_live.merged.discard(self.layer_name)


def check_mergeable(layers: Iterable[TangentLayer]) -> None:
    """Says what merging into quantized weights means, before it begins.

    Raises:
        ValueError: if the weight of a layer can not be quantized again.
    """
    kinds = set()
    for layer in layers:
        backend = layer.quantization_backend
        if backend is None or not layer.carried_axes():
            continue
        if not backend.supports_merge:
            raise ValueError(_NOT_AGAIN.format(layer.layer_name, backend.backend_name))
        kinds.add(backend.backend_name)
    if kinds:
        warnings.warn(
            f"The axes are merged into weights quantized by {' and '.join(sorted(kinds))}, which are quantized again: "
            "that rounds τ as coarsely as the base. For merged weights without this loss use "
            "`model.export_merged(path)`, which writes the dequantized base with the tangent added.",
            stacklevel=4,
        )


_NOT_AGAIN = (
    "Layer {!r} is quantized by {}, and its weight can not be quantized again after merging. Load the base in "
    "bfloat16, load the axis there and merge or export it (`export_merged`); or run the axis unmerged; or export it as "
    "a LoRA, which needs no merging (`export_lora`)."
)


def _snapshot(base: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """The layer, and what PEFT's writing of a weight changes about it or about its parameter."""
    kept: dict[str, Any] = {"weight": base._parameters.get("weight")}
    if kept["weight"] is not None:
        kept["attributes"] = dict(vars(kept["weight"]))
    if "state" in vars(base):  # bitsandbytes 8-bit: the packed weight lies here once the layer has run
        kept["state"] = copy.copy(vars(base)["state"])
    return base, kept


def _restore_attributes(base: nn.Module, kept: dict[str, Any]) -> None:
    """bitsandbytes hands the old parameter's own attributes to the new one and changes them on the way."""
    if "attributes" in kept:
        own = vars(kept["weight"])
        own.clear()
        own.update(kept["attributes"])


def _restore(layer: TangentQuantized, base: nn.Module, kept: dict[str, Any]) -> None:
    layer.base_layer = base
    if kept["weight"] is not None:
        base.weight = kept["weight"]
    if "state" in kept:
        vars(base)["state"] = copy.copy(kept["state"])
    _restore_attributes(base, kept)
