"""How far an adapter moves from one moment to another, in the space of ΔW; no ΔW = B·A is formed.

The factors of a LoRA are not unique (B·A = BR·R⁻¹A), their product is, so distances are those of the products, by
⟨BA, B'A'⟩ = Σ (BᵀB') ∘ (AA'ᵀ) per layer, summed over the layers in float64. Of use for LoRA and for tangent axes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn

from tangent_peft.tuner.axes import tangent_layers
from tangent_peft.tuner.weights import TangentFactors


Deltas: TypeAlias = dict[str, TangentFactors]
NOISE = 1e-6  # ‖Δ₂ − Δ₁‖/‖Δ₁‖ below which rounding in float64 decides the direction


@dataclass(frozen=True)
class Movement:
    """From Δ₁ to Δ₂, Frobenius norms over all adapted layers.

    Attributes:
        norm_before: ‖Δ₁‖.
        norm_after: ‖Δ₂‖.
        moved: ‖Δ₂ − Δ₁‖, to about 1e-8 of the norms.
        relative: ‖Δ₂ − Δ₁‖ / ‖Δ₁‖; NaN for Δ₁ = 0.
        cosine: cos(Δ₂ − Δ₁, Δ₁); NaN where either is 0, or Δ₂ − Δ₁ too small against Δ₁ to have a direction.
    """

    norm_before: float
    norm_after: float
    moved: float
    relative: float
    cosine: float


@torch.no_grad()
def adapter_deltas(model: PeftModel, adapter: str) -> Deltas:
    """Copies the factors of an adapter's ΔW, layer by layer.

    Args:
        model: with a LoRA or a tangent axis of that name.
        adapter: its name.

    Returns:
        Factors by the name of the layer, scaled as the adapter applies them. Modules that are kept whole
        (`modules_to_save`) and LoRA biases are not part of them.

    Raises:
        ValueError: for an adapter that is not there, or one whose ΔW is not B·A (DoRA, convolutions, experts).
    """
    if adapter not in model.peft_config:
        raise ValueError(
            f"The model has the adapters {sorted(model.peft_config)} and no {adapter!r}. Name one of them."
        )
    found: Deltas = {}
    for layer in tangent_layers(model):
        if adapter in layer.tangent_r:
            found[layer.layer_name] = _copied(layer.factors(adapter, 1.0))
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            found.update(_lora_factors(name, module, adapter))
    if not found:
        raise ValueError(
            f"Adapter {adapter!r} ({type(model.peft_config[adapter]).__name__}) has no factors of a ΔW that are known "
            "here. Movement is measured of LoRA and of tangent axes."
        )
    return found


def _lora_factors(name: str, layer: LoraLayer, adapter: str) -> Deltas:
    if adapter in layer.lora_embedding_A:
        # W is (V, D) and the layer adds s·(B A)ᵀ, with B (D, r) and A (r, V).
        b, a = layer.lora_embedding_B[adapter], layer.lora_embedding_A[adapter]
        return {name: TangentFactors(b=(layer.scaling[adapter] * a.mT.float()).clone(), a=b.mT.float().clone())}
    if adapter not in layer.lora_A:
        return {}
    down: Any = layer.lora_A[adapter]
    up: Any = layer.lora_B[adapter]
    plain = isinstance(down, nn.Linear) and isinstance(up, nn.Linear) and not isinstance(layer, ParamWrapper)
    if not plain or adapter in layer.lora_variant:
        kind = type(layer.lora_variant.get(adapter, layer)).__name__
        raise ValueError(
            f"The LoRA {adapter!r} on {name!r} is a {kind}, whose ΔW is not B·A. Movement is measured of plain LoRA "
            "on linear and embedding layers."
        )
    b = layer.scaling[adapter] * up.weight.float()  # the product would be rounded to a LoRA's own bfloat16
    return {name: _copied(TangentFactors(b=b, a=down.weight))}


def _copied(factors: TangentFactors) -> TangentFactors:
    held: dict[str, Tensor | None] = vars(factors)
    return TangentFactors(**{name: None if x is None else x.detach().clone() for name, x in held.items()})


def movement(before: Mapping[str, TangentFactors], after: Mapping[str, TangentFactors]) -> Movement:
    """How far an adapter went.

    ‖Δ₂ − Δ₁‖² = ‖Δ₂‖² − 2⟨Δ₂, Δ₁⟩ + ‖Δ₁‖² cancels where the adapter hardly moved; in float64 what is left is good
    to 1e-8 of the norms.

    Args:
        before: what `adapter_deltas` gave, Δ₁.
        after: the same adapter's later, Δ₂.

    Raises:
        ValueError: if they are not of the same layers.
    """
    if before.keys() != after.keys():
        other = sorted(before.keys() ^ after.keys())
        raise ValueError(f"The two are not of the same layers; {other[:3]} ({len(other)}) are in one only.")
    first = sum(float(x.square_norm()) for x in before.values())
    second = sum(float(x.square_norm()) for x in after.values())
    both = sum(float(after[name].inner(x)) for name, x in before.items())
    square = max(second - 2 * both + first, 0.0)
    moved, norm = math.sqrt(square), math.sqrt(first)
    return Movement(
        norm_before=norm,
        norm_after=math.sqrt(second),
        moved=moved,
        relative=moved / norm if norm else math.nan,
        cosine=(both - first) / (moved * norm) if norm and moved > NOISE * norm else math.nan,
    )
