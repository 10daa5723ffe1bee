"""The layers that carry a tangent: y = W x + b with ΔW = τ as its derivative.

A wrapped layer maps the dual pair (x, ẋ) to (W x + b, W ẋ + Σ λᵢ τᵢ x). The base weight is never touched; τ is dense
(ΔW itself) or low rank (B·A). Not linearized, the layer is an ordinary adapter, W x + b + Σ λᵢ τᵢ x.

Every adapter attribute starts with `tangent_`, which is how PEFT and transformers recognize what to save.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tangent_peft.forward import Gradient, TangentCarrier, current_pass, deposit, dual, is_replaying, split
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.projection import shared_projection
from tangent_peft.tuner.weights import TangentFactors, TangentWeight, leaf_weight


STACKED_ROWS = 64  # up to so many rows, reading the weight costs more than multiplying by it


class TangentLayer(TangentCarrier, BaseTunerLayer):
    """What all wrapped layers share: the tangents by adapter name, their weights λ, merging.

    Abstract; `TangentLinear` and `TangentConv1D` say how the base layer stores W.
    """

    adapter_layer_names = ("tangent_delta", "tangent_A", "tangent_B")
    other_param_names = (
        "tangent_r",
        "tangent_scaling",
        "tangent_linearize",
        "tangent_gradient",
        "tangent_projection",
        "tangent_key",
    )

    base_layer: Any  # nn.Linear or Conv1D, or another tuner's layer around one

    def __init__(self, base_layer: nn.Module, in_features: int, out_features: int, layer_name: str) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.layer_name = layer_name
        self.tangent_delta = nn.ModuleDict()
        self.tangent_A = nn.ModuleDict()
        self.tangent_B = nn.ModuleDict()
        self.tangent_r: dict[str, int | None] = {}
        self.tangent_scaling: dict[str, float] = {}
        self.tangent_linearize: dict[str, bool] = {}
        self.tangent_gradient: dict[str, Gradient] = {}
        # Plain tensors, not buffers: casting the model must not round a projection that is never stored.
        self.tangent_projection: dict[str, Tensor] = {}
        self.tangent_key: dict[str, tuple[int, int]] = {}
        self.tangent_forced: bool | None = None  # set by TangentModel.linearized(...)
        self.tangent_tied = False  # the weight is shared with the input embedding
        self.tangent_merged: dict[str, float] = {}
        self._tied_weight: nn.Parameter | None = None
        self.tangent_suspended: frozenset[str] = frozenset()  # the adapters that train again once enabled
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True

    # ---- adapters ----------------------------------------------------------------------------------------------

    def update_layer(self, adapter_name: str, r: int | None, config: TangentConfig) -> None:
        """Adds the tangent of an adapter: dense for `r=None`, else of rank r."""
        self.tangent_r[adapter_name] = r
        self.tangent_scaling[adapter_name] = 1.0
        self.tangent_linearize[adapter_name] = config.linearize
        self.tangent_gradient[adapter_name] = config.gradient
        if r is None:
            self.tangent_delta[adapter_name] = TangentWeight(self.out_features, self.in_features)
        else:
            self.tangent_B[adapter_name] = TangentWeight(self.out_features, r)
            self._set_projection(adapter_name, r, config)
        if not config.init_weights:
            self._randomize(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _set_projection(self, adapter_name: str, r: int, config: TangentConfig) -> None:
        key = (config.projection_seed, r)
        known = next((name for name, other in self.tangent_key.items() if other == key), None)
        projection = (
            shared_projection(config.projection_seed, self.layer_name, r, self.in_features)
            if known is None
            else self.tangent_projection[known]
        )
        if config.projection == "shared":
            self.tangent_key[adapter_name] = key
            self.tangent_projection[adapter_name] = projection
            return
        self.tangent_A[adapter_name] = TangentWeight(r, self.in_features)
        weight = leaf_weight(self.tangent_A, adapter_name)
        if not weight.is_meta:  # low_cpu_mem_usage: the weights come from the checkpoint
            weight.data.copy_(projection)

    def _randomize(self, adapter_name: str) -> None:
        """A tangent of about a percent of a typical weight, for tests."""
        for holder in (self.tangent_delta, self.tangent_B):
            if adapter_name in holder and not leaf_weight(holder, adapter_name).is_meta:
                nn.init.normal_(leaf_weight(holder, adapter_name), std=0.02)

    def trained_adapters(self) -> frozenset[str]:
        """The adapters that train at this layer, or will once it is enabled again."""
        if self.disable_adapters:
            return self.tangent_suspended
        holders = (self.tangent_delta, self.tangent_A, self.tangent_B)
        return frozenset(n for holder in holders for n in holder if leaf_weight(holder, n).requires_grad)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activates adapters; those of a disabled layer train, or not, once it is enabled."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.tangent_suspended = frozenset() if inference_mode else frozenset(self.active_adapters)

    def enable_adapters(self, enabled: bool) -> None:
        """Switches the adapters on or off; once on again, those train that did before."""
        if enabled != self.disable_adapters:
            return
        if enabled:
            self._disable_adapters = False
            self.set_requires_grad(sorted(self.tangent_suspended))
        else:
            suspended = self.trained_adapters()
            super().enable_adapters(False)
            self.tangent_suspended = suspended

    def carried_axes(self) -> dict[str, float]:
        """The active axes of this layer and their λ; those at λ = 0 contribute nothing and are left out."""
        if self.disable_adapters or self.merged:
            return {}
        names = (name for name in self.active_adapters if name in self.tangent_r)
        return {name: scale for name in names if (scale := self.tangent_scaling[name]) != 0.0}

    def tangent_mix(self) -> Hashable | None:
        """The linearized axes and their λ, sorted; `None` if there are none."""
        carried = self.carried_axes()
        return tuple(sorted(carried.items())) if carried and self._linearized(carried) else None

    def is_additive(self) -> bool:
        """Whether active axes add ΔW to the weights here."""
        carried = self.carried_axes()
        return bool(carried) and not self._linearized(carried)

    def tangent_parameters(self) -> list[nn.Parameter]:
        """The matrices of all adapters that train."""
        holders = (self.tangent_delta, self.tangent_A, self.tangent_B)
        weights = (leaf_weight(holder, name) for holder in holders for name in holder)
        return [weight for weight in weights if weight.requires_grad]

    def gradient_modes(self) -> set[Gradient]:
        """How the gradients of the active axes are to be computed."""
        return {self.tangent_gradient[name] for name in self.carried_axes()}

    def _linearized(self, carried: dict[str, float]) -> bool:
        if self.tangent_forced is not None:
            return self.tangent_forced
        modes = {self.tangent_linearize[name] for name in carried}
        if len(modes) > 1:
            raise ValueError(
                f"Layer {self.layer_name!r} has active axes of both kinds: "
                f"{ {name: self.tangent_linearize[name] for name in carried} } (linearize). Activate one kind, or "
                "evaluate all of them as weights inside `with model.linearized(False):`."
            )
        return modes.pop()

    # ---- the tangent -------------------------------------------------------------------------------------------

    def projection(self, adapter_name: str, device: torch.device) -> Tensor:
        """A (r, in) of a low-rank adapter, trained or shared."""
        if adapter_name in self.tangent_A:
            return leaf_weight(self.tangent_A, adapter_name)
        if self.tangent_projection[adapter_name].device != device:
            self.tangent_projection[adapter_name] = self.tangent_projection[adapter_name].to(device)
        return self.tangent_projection[adapter_name]

    def factors(self, adapter_name: str, scale: float) -> TangentFactors:
        """The tangent of an adapter at weight `scale`, connected to its parameters."""
        if self.tangent_r[adapter_name] is None:
            weight = leaf_weight(self.tangent_delta, adapter_name)
            return TangentFactors(dense=weight if scale == 1.0 else weight * scale)
        weight = leaf_weight(self.tangent_B, adapter_name)
        a = self.projection(adapter_name, weight.device).to(weight.dtype)
        return TangentFactors(b=weight if scale == 1.0 else weight * scale, a=a)

    def delta(self, adapter_name: str, scale: float) -> Tensor:
        """λ·ΔW (out, in) of an adapter at λ = `scale`."""
        factors = self.factors(adapter_name, scale)
        if factors.dense is not None:
            return factors.dense
        assert factors.b is not None and factors.a is not None
        return factors.b @ factors.a

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """λ·ΔW in the layout of the base weight, at the adapter's current λ."""
        return self._layout(self.delta(adapter_name, self.tangent_scaling[adapter_name]))

    def _apply_tangent(self, x: Tensor, carried: dict[str, float]) -> Tensor:
        """Σ λᵢ τᵢ x."""
        total = None
        for name, scale in carried.items():
            if self.tangent_r[name] is None:
                term = self.tangent_delta[name](x)
            elif name in self.tangent_A:
                term = self.tangent_B[name](self.tangent_A[name](x))
            else:
                term = self.tangent_B[name](F.linear(x, self.projection(name, x.device).to(x.dtype)))
            term = term if scale == 1.0 else term * scale
            total = term if total is None else total + term
        assert total is not None
        return total

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(x, ẋ) → (W x + b, W ẋ + Σ λᵢ τᵢ x), dual inside a linearized pass; the ordinary layer without active axes.

        Raises:
            RuntimeError: if the axes are linearized but no pass is open.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        carried = self.carried_axes()
        if not carried:
            return self.base_layer(x, *args, **kwargs)
        if not self._linearized(carried):
            y = self.base_layer(x, *args, **kwargs)
            return y + self._apply_tangent(x, carried).to(y.dtype)
        if is_replaying():
            return self._replay(x, carried, *args, **kwargs)
        if current_pass() is None:
            raise RuntimeError(
                f"Layer {self.layer_name!r} carries the linearized axes {carried} but was called outside of a "
                "linearized forward, where its tangent would be lost. Call the whole model that was wrapped, not a "
                "part of it; to run a part, use `with model.linearized(False):` (weights) or "
                "`with model.disable_adapter():` (base)."
            )
        primal, tangent = split(x)
        y, passed_on = self._apply_base(primal, tangent, *args, **kwargs)
        dy = self._apply_tangent(primal, carried).to(y.dtype)
        return dual(y, dy if passed_on is None else dy + passed_on)

    def _replay(self, x: Tensor, carried: dict[str, float], *args: Any, **kwargs: Any) -> Tensor:
        """W x + b, whose backward leaves the tangents' gradients."""
        y = self.base_layer(x, *args, **kwargs)
        for name, scale in carried.items():
            y = deposit(y, x, scale, **vars(self.factors(name, 1.0)))
        return y

    def _apply_base(
        self, primal: Tensor, tangent: Tensor | None, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """W x + b and W ẋ. Few rows, as in decoding, are bound by reading W: both are then one product."""
        if tangent is None:
            return self.base_layer(primal, *args, **kwargs), None
        few = primal.numel() <= STACKED_ROWS * self.in_features
        if few and self.bias is None and not torch.is_grad_enabled():
            y, passed_on = self.base_layer(torch.cat([primal, tangent]), *args, **kwargs).chunk(2)
            return y, passed_on
        return self.base_layer(primal, *args, **kwargs), self._linear_part(tangent)

    def _linear_part(self, x: Tensor) -> Tensor:
        """W x, without the bias."""
        raise NotImplementedError

    def _layout(self, delta: Tensor) -> Tensor:
        """ΔW (out, in) as the base layer stores W."""
        raise NotImplementedError

    # ---- merging -----------------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds λ·ΔW of the adapters to the base weight; a tied weight is untied first, the embedding keeps its own.

        Raises:
            ValueError: with `safe_merge`, if the result is not finite; nothing has changed then.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.tangent_r:
                continue
            delta = self.get_delta_weight(name)
            weight = self.get_base_weight()
            merged = weight + delta.to(weight.device, weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
            self._set_merged(merged)
            self.merged_adapters.append(name)
            self.tangent_merged[name] = self.tangent_scaling[name]

    def _set_merged(self, merged: Tensor) -> None:
        base: Any = self.get_base_layer()
        if self.tangent_tied and self._tied_weight is None:
            self._tied_weight = base.weight
            base.weight = nn.Parameter(merged, requires_grad=base.weight.requires_grad)
            return
        self.set_base_weight(merged)

    def unmerge(self) -> None:
        """Takes the merged adapters out again; a weight that was tied before is tied again, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.get_base_layer()
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            scale = self.tangent_merged.pop(name)
            weight = self.get_base_weight()
            delta = self._layout(self.delta(name, scale)).to(weight.device, weight.dtype)
            self.set_base_weight(weight - delta)
        if self._tied_weight is not None:
            base.weight, self._tied_weight = self._tied_weight, None

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """ΔW is an ordinary update of the weight, so it can become a LoRA."""
        return True

    @property
    def weight(self) -> Tensor:
        """The base layer's weight.

        Raises:
            RuntimeError: on a head inside a forward that would lose its tangent by reading W instead of calling it.
        """
        if self.tangent_guarded and self.carried_axes():
            raise RuntimeError(
                f"Something reads the weight of {self.layer_name!r} instead of calling it, so the tangent of axes "
                f"{self.carried_axes()} on the head would be lost. TRL's own trainers do: train with "
                "`TangentDPOTrainer`, or give the head no tangent: `TangentConfig(lm_head=False)`."
            )
        return super().weight

    def __repr__(self) -> str:
        return "tangent." + nn.Module.__repr__(self)


class TangentLinear(TangentLayer):
    """Final: a wrapped `nn.Linear`, W (out, in)."""

    def __init__(self, base_layer: nn.Linear, layer_name: str) -> None:
        super().__init__(base_layer, base_layer.in_features, base_layer.out_features, layer_name)

    def _linear_part(self, x: Tensor) -> Tensor:
        if self.base_layer.bias is None:
            return self.base_layer(x)
        return F.linear(x, self.base_layer.weight)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta


class TangentConv1D(TangentLayer):
    """Final: a wrapped `transformers.pytorch_utils.Conv1D` (GPT-2), W (in, out)."""

    def __init__(self, base_layer: Conv1D, layer_name: str) -> None:
        super().__init__(base_layer, base_layer.nx, base_layer.nf, layer_name)

    def _linear_part(self, x: Tensor) -> Tensor:
        return F.linear(x, self.base_layer.weight.mT)

    def _layout(self, delta: Tensor) -> Tensor:
        return delta.mT


def wrap_layer(base_layer: nn.Module, layer_name: str) -> TangentLayer:
    """The tangent layer for a base layer.

    Raises:
        TypeError: if layers of this type can not carry a tangent.
    """
    if isinstance(base_layer, nn.Linear):
        return TangentLinear(base_layer, layer_name)
    if isinstance(base_layer, Conv1D):
        return TangentConv1D(base_layer, layer_name)
    raise TypeError(
        f"Module {layer_name!r} is a {type(base_layer).__name__}; a tangent can be carried by torch.nn.Linear and "
        "transformers' Conv1D. Take it out of `target_modules`, or add it to `exclude_modules`."
    )
