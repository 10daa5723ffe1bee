"""`TangentHolder`: the tangents that one wrapped layer holds, by adapter name, with their weights λ and their modes.

It knows which axes there are, which are active and which train, and how PEFT switches them; `layer.py` adds what a
tangent does to the layer's output. Every adapter attribute starts with `tangent_`, which is how PEFT and transformers
recognize what to save.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from tangent_peft.forward import Gradient, TangentCarrier
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.live import LiveMix, RowLayout, RowWeights, Weight
from tangent_peft.tuner.projection import shared_projection
from tangent_peft.tuner.weights import TangentWeight, leaf_weight


class TangentHolder(TangentCarrier, BaseTunerLayer):
    """Abstract: what a wrapped layer holds. `TangentLayer` says what it does."""

    adapter_layer_names = ("tangent_delta", "tangent_A", "tangent_B")
    other_param_names = (
        "tangent_r",
        "tangent_linearize",
        "tangent_gradient",
        "tangent_projection",
        "tangent_key",
    )

    base_layer: Any  # nn.Linear or Conv1D, or another tuner's layer around one

    def __init__(
        self,
        base_layer: nn.Module,
        in_features: int,
        out_features: int,
        layer_name: str,
        leading: tuple[int, ...] = (),
    ) -> None:
        nn.Module.__init__(self)
        self.base_layer = base_layer
        self.in_features, self.out_features = in_features, out_features
        self.leading = leading  # (E,) for the fused weights of E experts
        self.layer_name = layer_name
        self.tangent_delta = nn.ModuleDict()
        self.tangent_A = nn.ModuleDict()
        self.tangent_B = nn.ModuleDict()
        self.tangent_r: dict[str, int | None] = {}
        self.tangent_live = LiveMix([])  # the model's, once it has taken the layer in
        self.tangent_rows: frozenset[RowLayout] = frozenset({"batch", "tokens"})  # how rows may lie in its inputs
        self.tangent_linearize: dict[str, bool] = {}
        self.tangent_gradient: dict[str, Gradient] = {}
        # Plain tensors, not buffers: casting the model must not round a projection that is never stored.
        self.tangent_projection: dict[str, Tensor] = {}
        self.tangent_key: dict[str, tuple[int, int]] = {}
        self.tangent_tied = False  # the weight is shared with the input embedding
        self.tangent_merged: dict[str, float] = {}
        self._tied_weight: nn.Parameter | None = None
        self.tangent_suspended: frozenset[str] = frozenset()  # the adapters that train again once enabled
        self._disable_adapters = False
        self.merged_adapters = []
        self.cast_input_dtype_enabled = True

    def update_layer(self, adapter_name: str, r: int | None, config: TangentConfig) -> None:
        """Adds the tangent of an adapter: dense for `r=None`, else of rank r."""
        self.tangent_r[adapter_name] = r
        self.tangent_live.weights[adapter_name] = 1.0
        self.tangent_linearize[adapter_name] = config.linearize
        self.tangent_gradient[adapter_name] = config.gradient
        if r is None:
            self.tangent_delta[adapter_name] = TangentWeight(*self.leading, self.out_features, self.in_features)
        else:
            self.tangent_B[adapter_name] = TangentWeight(*self.leading, self.out_features, r)
            self._set_projection(adapter_name, r, config)
        if not config.init_weights:
            self._randomize(adapter_name)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _set_projection(self, adapter_name: str, r: int, config: TangentConfig) -> None:
        key = (config.projection_seed, r)
        known = next((name for name, other in self.tangent_key.items() if other == key), None)
        projection = (
            self._shared_projection(config.projection_seed, r) if known is None else self.tangent_projection[known]
        )
        if config.projection == "shared":
            self.tangent_key[adapter_name] = key
            self.tangent_projection[adapter_name] = projection
            return
        self.tangent_A[adapter_name] = TangentWeight(*self.leading, r, self.in_features)
        weight = leaf_weight(self.tangent_A, adapter_name)
        if not weight.is_meta:  # low_cpu_mem_usage: the weights come from the checkpoint
            weight.data.copy_(projection)

    def _shared_projection(self, seed: int, r: int) -> Tensor:
        """A (r, in) with orthonormal rows; one for all experts of a fused weight."""
        return shared_projection(seed, self.layer_name, r, self.in_features)

    def _randomize(self, adapter_name: str) -> None:
        """A tangent of about a percent of a typical weight, for tests."""
        for holder in (self.tangent_delta, self.tangent_B):
            if adapter_name in holder and not leaf_weight(holder, adapter_name).is_meta:
                nn.init.normal_(leaf_weight(holder, adapter_name), std=0.02)

    @property
    def _active_adapter(self) -> list[str]:  # where PEFT keeps the active adapters
        return self.tangent_live.active

    @_active_adapter.setter
    def _active_adapter(self, names: str | list[str]) -> None:
        self.tangent_live.active = [names] if isinstance(names, str) else names

    @property
    def tangent_scaling(self) -> dict[str, Weight]:
        """λ of the model's axes, this layer's or not."""
        return self.tangent_live.weights

    @property
    def weight_name(self) -> str:
        """Full name of the weight in the unmodified model."""
        return f"{self.layer_name}.weight"

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Gives a weight set from outside to the base layer; `PreTrainedModel.tie_weights` sets the head's."""
        if name == "weight":
            base: Any = self.get_base_layer()
            base.weight = param
        else:
            super().register_parameter(name, param)

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
        self.tangent_live.training |= self.tangent_suspended

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters train, or not."""
        super().set_requires_grad(adapter_names, requires_grad)
        if requires_grad:
            self.tangent_live.training |= {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter's tangent; PEFT calls this for every layer, and so do we."""
        self.tangent_live.weights.pop(adapter_name, None)
        super().delete_adapter(adapter_name)

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

    def carried_axes(self) -> dict[str, Weight]:
        """The active axes of this layer and their λ; those at λ = 0 contribute nothing and are left out."""
        if self._disable_adapters or self.merged_adapters:
            return {}
        live = self.tangent_live
        named = ((name, live.weights[name]) for name in live.active if name in self.tangent_r)
        return {name: weight for name, weight in named if (any(weight) if isinstance(weight, tuple) else weight != 0.0)}

    def uniform_axes(self) -> dict[str, float]:
        """As `carried_axes`, where the rows of a batch can not have a mix each.

        Raises:
            NotImplementedError: if they have.
        """
        carried = {}
        for name, weight in self.carried_axes().items():
            if isinstance(weight, RowWeights):
                raise NotImplementedError(self._one_mix("its gradient is replayed", {name: weight}))
            carried[name] = weight
        return carried

    def _one_mix(self, reason: str, carried: Mapping[str, Weight]) -> str:
        found = {name: weight for name, weight in carried.items() if isinstance(weight, RowWeights)}
        return (
            f"{type(self).__name__} {self.layer_name!r} can only give all rows of a batch one mix here, because "
            f"{reason}; but it has axes of which each row has its own λ: {found}. Run the rows of each mix as a batch "
            "of their own, inside `with model.axes({...}):`."
        )

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

    def leaves(self, adapter_name: str) -> list[nn.Module]:
        """The modules that hold the matrices of an adapter."""
        holders = (self.tangent_delta, self.tangent_A, self.tangent_B)
        return [holder[adapter_name] for holder in holders if adapter_name in holder]

    def active_leaves(self) -> list[nn.Module]:
        """The modules that hold the matrices of the active axes."""
        return [leaf for name in self.carried_axes() for leaf in self.leaves(name)]

    def gradient_modes(self) -> set[Gradient]:
        """How the gradients of the active axes are to be computed."""
        return {self.tangent_gradient[name] for name in self.carried_axes()}

    def _linearized(self, carried: Mapping[str, Weight]) -> bool:
        if self.tangent_live.forced is not None:
            return self.tangent_live.forced
        modes = {self.tangent_linearize[name] for name in carried}
        if len(modes) > 1:
            raise ValueError(
                f"Layer {self.layer_name!r} has active axes of both kinds: "
                f"{ {name: self.tangent_linearize[name] for name in carried} } (linearize). Activate one kind, or "
                "evaluate all of them as weights inside `with model.linearized(False):`."
            )
        return modes.pop()
