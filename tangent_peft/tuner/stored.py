"""A tangent at every layer stored as an adapter of its own, and the tangent that a mix of axes is: Σ λᵢ τᵢ.

shared projection, same seed and rank:   (Σ λᵢ Bᵢ) · A                 rank r, exact
otherwise, all low rank:                 [λ₁B₁ … λₖBₖ] · [A₁; …; Aₖ]   rank Σ rᵢ, at most that of the matrix, exact
one of them dense:                       Σ λᵢ ΔWᵢ                      dense, exact

It knows no other way to combine axes than this sum: `combine.py` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from tangent_peft.forward import is_sharded
from tangent_peft.tuner.axes import (
    check_known,
    check_unmerged,
    check_weights,
    preserved,
    refuse_saved_modules,
    tangent_layers,
)
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.decompose import at_least_single
from tangent_peft.tuner.embedding import TangentEmbedding
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.weights import TangentFactors, leaf_weight


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs


def store(tuner: AxisVerbs, weights: Mapping[str, float], adapter_name: str) -> None:
    """Adds the adapter `adapter_name` with tangent Σ λᵢ τᵢ; see `AxisVerbs.combine_axes`."""
    store_mix(tuner, check_weights(tuner, weights), adapter_name)


def store_mix(tuner: AxisVerbs, weights: Mapping[str, float], adapter_name: str) -> None:
    """As `store`, of weights that are known to be finite numbers and may be of any size."""
    check_sources(tuner, list(weights), adapter_name)
    weights = without_zeros(weights)
    with torch.no_grad():
        mixed = mix_factors(tuner, weights)
    add_axis(tuner, adapter_name, mixed, list(weights), common_seed(tuner, weights))


def without_zeros(weights: Mapping[str, float]) -> dict[str, float]:
    """The axes that count, which alone decide the form and rank of their mix; all of them where none does."""
    return {name: weight for name, weight in weights.items() if weight != 0.0} or dict(weights)


# ---- any tangent as an adapter ---------------------------------------------------------------------------------------


def check_sources(tuner: AxisVerbs, names: Sequence[str], adapter_name: str) -> None:
    """What must hold before these axes become one new adapter; nothing has changed where it does not.

    Raises:
        ValueError: for a name that is taken or is none, an unknown axis, no axis at all, axes of both kinds
            (`linearize`), an axis that keeps modules of its own, a merged model, or a tangent that is not finite or is
            sharded.
    """
    if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
        raise ValueError(f"The name of a new axis is a string without dots, found {adapter_name!r}.")
    if adapter_name in dir(nn.ModuleDict):
        raise ValueError(
            f"{adapter_name!r} is the name of something that every torch module has, so PEFT can not keep an adapter "
            "under it. Choose another name."
        )
    if adapter_name in tuner.peft_config:
        raise ValueError(
            f"An axis named {adapter_name!r} exists already. Choose another name, or delete it first with "
            f"`model.delete_adapter({adapter_name!r})`."
        )
    check_known(tuner, names)
    if not names:
        raise ValueError("A stored mix needs at least one axis; the mix given is empty.")
    kinds = {name: tuner.peft_config[name].linearize for name in names}
    if len(set(kinds.values())) > 1:
        raise ValueError(
            f"Axes {kinds} (linearize) can not be stored as one: one adapter either is linearized or adds its weights."
        )
    refuse_saved_modules(tuner, names)
    check_unmerged(tuner)
    check_tangents(tuner, names)


def check_tangents(tuner: AxisVerbs, names: Iterable[str]) -> None:
    """Raises a `ValueError` for a tangent that is not finite, or is sharded over processes."""
    for layer in tangent_layers(tuner.model):
        for name in names:
            _check_tangent(layer, name)


def _check_tangent(layer: TangentLayer, name: str) -> None:
    parameters = [parameter for leaf in layer.leaves(name) for parameter in leaf.parameters()]
    if any(is_sharded(parameter) for parameter in parameters):
        raise ValueError(
            f"Axis {name!r} is sharded over several processes (layer {layer.layer_name!r}), and is not combined there. "
            "Save it, load it into a model in one process, and combine it in that."
        )
    if not all(torch.isfinite(parameter).all() for parameter in parameters):
        raise ValueError(
            f"Axis {name!r} has a tangent with NaN or infinite entries at layer {layer.layer_name!r}. Its training "
            "broke down or its file is damaged; load a checkpoint from before, or leave the axis out."
        )


def add_axis(
    tuner: AxisVerbs,
    adapter_name: str,
    tangents: Mapping[str, TangentFactors],
    sources: Sequence[str],
    seed: int | None = None,
) -> None:
    """Adds a frozen adapter with these tangents; what is active stays so.

    Args:
        tuner: the wrapped model.
        adapter_name: name of the new axis, checked by `check_sources`.
        tangents: ΔW by layer name, λ included; where one is dense, all become so.
        sources: the axes it was made of; the first gives the base model's name and the task.
        seed: that of the shared projection, if every `a` is the one which that seed and its rank give; `None` stores
            each `a` ("trained").
    """
    tangents = _uniform(tangents)
    with preserved(tuner):
        tuner.peft_config[adapter_name] = _config(tuner, tangents, sources, seed)
        try:
            tuner.inject_adapter(tuner.model, adapter_name)
            for layer in tangent_layers(tuner.model):
                if layer.layer_name in tangents:
                    _fill(layer, adapter_name, tangents[layer.layer_name])
        except BaseException:
            tuner.peft_config.pop(adapter_name, None)
            for layer in tangent_layers(tuner.model):
                layer.delete_adapter(adapter_name)
            raise
    tuner.set_requires_grad(adapter_name, False)


def _uniform(tangents: Mapping[str, TangentFactors]) -> dict[str, TangentFactors]:
    """Dense at every layer if it is at one: an adapter has one form of τ."""
    if all(factors.dense is None for factors in tangents.values()):
        return dict(tangents)
    return {name: TangentFactors(dense=factors.product()) for name, factors in tangents.items()}


def _config(
    tuner: AxisVerbs, tangents: Mapping[str, TangentFactors], names: Sequence[str], seed: int | None
) -> TangentConfig:
    sources = [tuner.peft_config[name] for name in names]
    ranks = {name: factors.a.shape[-2] for name, factors in tangents.items() if factors.a is not None}
    r = max(ranks.values(), default=None)
    fused = {layer.layer_name for layer in tangent_layers(tuner.model) if isinstance(layer, TangentExperts)}
    return TangentConfig(
        r=r,
        projection="shared" if r is None or seed is not None else "trained",
        projection_seed=0 if r is None or seed is None else seed,
        num_layers=None,
        lm_head=False,
        target_modules=sorted(set(tangents) - fused),
        target_parameters=sorted(set(tangents) & fused) or None,
        rank_pattern={name.replace(".", r"\."): k for name, k in ranks.items() if k != r},
        linearize=sources[0].linearize,
        task_type=sources[0].task_type,
        base_model_name_or_path=sources[0].base_model_name_or_path,
        base_fingerprint=sources[0].base_fingerprint,
        inference_mode=all(source.inference_mode for source in sources),
    )


def _fill(layer: TangentLayer, adapter_name: str, factors: TangentFactors) -> None:
    """Copies the factors into the adapter's parameters."""
    targets = {"tangent_delta": factors.dense, "tangent_B": factors.b, "tangent_A": factors.a}
    for attribute, value in targets.items():
        holder = layer.get_submodule(attribute)
        if isinstance(holder, nn.ModuleDict) and adapter_name in holder and value is not None:
            weight = leaf_weight(holder, adapter_name)
            whole = value.detach().to(weight.device).expand(weight.shape)
            copied = whole.clone(memory_format=torch.contiguous_format)  # a decomposition gives columns
            if isinstance(layer, TangentEmbedding) and layer.padding_idx is not None and attribute != "tangent_B":
                copied[..., layer.padding_idx] = 0.0  # a decomposition may leave rounding there
            holder[adapter_name].weight = nn.Parameter(copied, requires_grad=False)


# ---- the sum of axes -------------------------------------------------------------------------------------------------


def mix_factors(tuner: AxisVerbs, weights: Mapping[str, float]) -> dict[str, TangentFactors]:
    """Σ λᵢ τᵢ of every layer that carries one of the axes, by layer name; factors as in the table above."""
    mixed = {}
    for layer in tangent_layers(tuner.model):
        present = {name: scale for name, scale in weights.items() if name in layer.tangent_r}
        if present:
            mixed[layer.layer_name] = summed(layer, present)
    return mixed


def summed(layer: TangentLayer, weights: Mapping[str, float]) -> TangentFactors:
    """Σ λᵢ ΔWᵢ of axes that this layer carries, in the form of the table above and at least float32."""
    factors = [layer.factors(name, scale, at_least_single) for name, scale in weights.items()]
    if any(f.dense is not None for f in factors):
        deltas = [f.product() for f in factors]
        return TangentFactors(dense=sum(deltas[1:], start=deltas[0]))
    if len(factors) > 1 and _common_projection(layer, weights) is None:
        return concatenated(layer, weights)
    bs = [f.b for f in factors if f.b is not None]
    return TangentFactors(b=sum(bs[1:], start=bs[0]), a=factors[0].a)


def concatenated(layer: TangentLayer, weights: Mapping[str, float]) -> TangentFactors:
    """[λ₁B₁ … λₖBₖ] · [A₁; …; Aₖ], or Σ λᵢ ΔWᵢ where one of them is dense; at least float32."""
    factors = [layer.factors(name, scale, at_least_single) for name, scale in weights.items()]
    bs, projections = [f.b for f in factors if f.b is not None], [f.a for f in factors if f.a is not None]
    if len(bs) < len(factors):
        return summed(layer, weights)
    leading = torch.broadcast_shapes(*(a.shape[:-2] for a in projections))
    b = torch.cat(bs, dim=-1)
    a = torch.cat([a.expand(*leading, *a.shape[-2:]) for a in projections], dim=-2)
    return _of_full_rank(b, a) if b.shape[-1] > min(b.shape[-2], a.shape[-1]) else TangentFactors(b=b, a=a)


def _of_full_rank(b: torch.Tensor, a: torch.Tensor) -> TangentFactors:
    """ΔW · 1 or 1 · ΔW, where the ranks add up to more than a matrix of this size can have."""
    delta = b @ a
    rows, columns = delta.shape[-2:]
    one = torch.eye(min(rows, columns), dtype=delta.dtype, device=delta.device)
    one = one.expand(*delta.shape[:-2], *one.shape)
    return TangentFactors(b=delta, a=one) if columns <= rows else TangentFactors(b=one, a=delta)


def common_seed(tuner: AxisVerbs, names: Iterable[str]) -> int | None:
    """Seed of the shared projection that these axes have in common at every layer; `None` if they have none."""
    chosen = set(names)
    layers = [layer for layer in tangent_layers(tuner.model) if chosen & set(layer.tangent_r)]
    keys = [_common_projection(layer, chosen) for layer in layers]
    seeds = {None if key is None else key[0] for key in keys}
    return seeds.pop() if len(seeds) == 1 else None


def _common_projection(layer: TangentLayer, names: Iterable[str]) -> tuple[int, int] | None:
    """Seed and rank of the projection that all of these axes share at this layer; `None` if they share none."""
    keys = {layer.tangent_key.get(name) for name in names if name in layer.tangent_r}
    return keys.pop() if len(keys) == 1 else None
