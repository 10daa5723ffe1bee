"""A mix of axes stored as an adapter of its own: Σ λᵢ τᵢ as one tangent.

shared projection, same seed and rank:   (Σ λᵢ Bᵢ) · A             rank r, exact
otherwise, all low rank:                 [λ₁B₁ … λₖBₖ] · [A₁; …; Aₖ]   rank Σ rᵢ, exact
one of them dense:                       Σ λᵢ ΔWᵢ                  dense, exact
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from tangent_peft.tuner.axes import check_weights, preserved, refuse_saved_modules, tangent_layers
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.weights import TangentFactors, leaf_weight


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs


def store(tuner: AxisVerbs, weights: Mapping[str, float], adapter_name: str) -> None:
    """Adds the adapter `adapter_name` with tangent Σ λᵢ τᵢ; see `AxisVerbs.combine_axes`."""
    checked = check_weights(tuner, weights)
    if adapter_name in tuner.peft_config:
        raise ValueError(
            f"An axis named {adapter_name!r} exists already. Choose another name, or delete it first with "
            f"`model.delete_adapter({adapter_name!r})`."
        )
    if not checked:
        raise ValueError("A stored mix needs at least one axis; the mix given is empty.")
    refuse_saved_modules(tuner, checked)
    with torch.no_grad():
        mixed = _uniform(mix_factors(tuner, checked))
    with preserved(tuner):
        tuner.peft_config[adapter_name] = _mixed_config(tuner, checked, mixed)
        try:
            tuner.inject_adapter(tuner.model, adapter_name)
        except Exception:
            del tuner.peft_config[adapter_name]
            raise
        for layer in tangent_layers(tuner.model):
            if layer.layer_name in mixed:
                _fill(layer, adapter_name, mixed[layer.layer_name])
    tuner.set_requires_grad(adapter_name, False)


def mix_factors(tuner: AxisVerbs, weights: Mapping[str, float]) -> dict[str, TangentFactors]:
    """Σ λᵢ τᵢ of every layer that carries one of the axes, by layer name; factors as in the table above."""
    mixed = {}
    for layer in tangent_layers(tuner.model):
        present = {name: scale for name, scale in weights.items() if name in layer.tangent_r}
        if present:
            mixed[layer.layer_name] = _mix_layer(layer, present)
    return mixed


def _mix_layer(layer: TangentLayer, weights: Mapping[str, float]) -> TangentFactors:
    if any(layer.tangent_r[name] is None for name in weights):
        return TangentFactors(dense=sum(layer.delta(name, scale) for name, scale in weights.items()))  # type: ignore[arg-type]
    factors = [layer.factors(name, scale) for name, scale in weights.items()]
    bs, projections = [f.b for f in factors if f.b is not None], [f.a for f in factors if f.a is not None]
    if len(factors) == 1 or _common_projection(layer, weights) is not None:
        return TangentFactors(b=sum(bs[1:], start=bs[0]), a=projections[0])
    leading = torch.broadcast_shapes(*(a.shape[:-2] for a in projections))
    return TangentFactors(
        b=torch.cat(bs, dim=-1), a=torch.cat([a.expand(*leading, *a.shape[-2:]) for a in projections], dim=-2)
    )


def _common_projection(layer: TangentLayer, weights: Mapping[str, float]) -> tuple[int, int] | None:
    """Seed and rank of the projection that all of these axes share at this layer; `None` if they share none."""
    keys = {layer.tangent_key.get(name) for name in weights if name in layer.tangent_r}
    return keys.pop() if len(keys) == 1 else None


def _uniform(mixed: Mapping[str, TangentFactors]) -> dict[str, TangentFactors]:
    """Dense at every layer if it is at one: an adapter has one form of τ."""
    if all(factors.dense is None for factors in mixed.values()):
        return dict(mixed)
    return {name: TangentFactors(dense=factors.product()) for name, factors in mixed.items()}


def _mixed_config(tuner: AxisVerbs, weights: Mapping[str, float], mixed: Mapping[str, TangentFactors]) -> TangentConfig:
    sources = [tuner.peft_config[name] for name in weights]
    if len({source.linearize for source in sources}) > 1:
        raise ValueError(
            f"Axes { {name: tuner.peft_config[name].linearize for name in weights} } (linearize) can not be stored as "
            "one: one adapter either is linearized or adds its weights."
        )
    ranks = {name: factors.a.shape[-2] for name, factors in mixed.items() if factors.a is not None}
    r = max(ranks.values(), default=None)
    keys = [_common_projection(layer, weights) for layer in tangent_layers(tuner.model) if layer.layer_name in mixed]
    seeds = {None if key is None else key[0] for key in keys}
    shared = len(seeds) == 1 and None not in seeds
    fused = {layer.layer_name for layer in tangent_layers(tuner.model) if isinstance(layer, TangentExperts)}
    return TangentConfig(
        r=r,
        projection="shared" if r is None or shared else "trained",
        projection_seed=seeds.pop() if shared else 0,  # type: ignore[arg-type]
        num_layers=None,
        lm_head=False,
        target_modules=sorted(set(mixed) - fused),
        target_parameters=sorted(set(mixed) & fused) or None,
        rank_pattern={name.replace(".", r"\."): k for name, k in ranks.items() if k != r},
        linearize=sources[0].linearize,
        task_type=sources[0].task_type,
        base_model_name_or_path=sources[0].base_model_name_or_path,
        base_fingerprint=sources[0].base_fingerprint,
    )


def _fill(layer: TangentLayer, adapter_name: str, factors: TangentFactors) -> None:
    """Copies the mixed factors into the adapter's parameters."""
    targets = {"tangent_delta": factors.dense, "tangent_B": factors.b, "tangent_A": factors.a}
    for attribute, value in targets.items():
        holder = layer.get_submodule(attribute)
        if isinstance(holder, nn.ModuleDict) and adapter_name in holder and value is not None:
            weight = leaf_weight(holder, adapter_name)
            copied = value.detach().to(weight.device).expand(weight.shape).clone()
            holder[adapter_name].weight = nn.Parameter(copied, requires_grad=False)
