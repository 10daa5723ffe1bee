"""λ: activating a mix of axes live, storing it as an adapter, reading it, restoring it.

Live, a mix is one number per axis and layer; no weight is touched. Stored, Σ λᵢ τᵢ becomes a tangent of its own:

    shared projection, same seed and rank:   (Σ λᵢ Bᵢ) · A             rank r, exact
    otherwise, all low rank:                 [λ₁B₁ … λₖBₖ] · [A₁; …; Aₖ]   rank Σ rᵢ, exact
    one of them dense:                       Σ λᵢ ΔWᵢ                  dense, exact
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from tangent_peft.forward import gathered, whole
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.weights import TangentFactors, leaf_weight


if TYPE_CHECKING:
    from tangent_peft.tuner.model import TangentModel

SAFE_WEIGHT = 3.0  # TS-DPO reports that mixes break down beyond |λ| ≈ 3


def tangent_layers(model: nn.Module) -> Iterator[TangentLayer]:
    """The wrapped layers of `model`, in its order."""
    return (module for module in model.modules() if isinstance(module, TangentLayer))


@torch.no_grad()
def axis_norm(model: nn.Module, axis: str) -> float:
    """‖τ‖: the Frobenius norm of an axis's ΔW over all wrapped layers, at λ = 1; all processes of a sharded model."""
    squares = [_square_norm(layer, axis) for layer in tangent_layers(model) if axis in layer.tangent_r]
    return math.sqrt(sum(float(square) for square in squares))


def _square_norm(layer: TangentLayer, axis: str) -> Tensor:
    with gathered(parameter for leaf in layer.leaves(axis) for parameter in leaf.parameters()):
        factors = {name: None if x is None else whole(x) for name, x in vars(layer.factors(axis, 1.0)).items()}
        return TangentFactors(**factors).square_norm()


def check_weights(tuner: TangentModel, weights: Mapping[str, float]) -> dict[str, float]:
    """The mix as plain floats.

    Raises:
        ValueError: for an unknown axis, or a λ that is not a finite number.
    """
    checked = {}
    for name, weight in weights.items():
        if name not in tuner.peft_config:
            raise ValueError(
                f"Unknown axis {name!r}; this model has {sorted(tuner.peft_config)}. Load it first with "
                f"`model.load_adapter(path, adapter_name={name!r})`."
            )
        value = _as_number(weight)
        if not math.isfinite(value):
            raise ValueError(f"The weight of axis {name!r} is {weight!r}; λ must be a finite number.")
        if abs(value) > SAFE_WEIGHT:
            warnings.warn(
                f"λ = {value} for axis {name!r}: mixes beyond |λ| = {SAFE_WEIGHT:g} are outside the range in which "
                "TS-DPO was found to work; check the linearity gap and read the answers.",
                stacklevel=4,
            )
        checked[name] = value
    return checked


def _as_number(weight: object) -> float:
    """A number of any library as a float; NaN for what is none."""
    try:
        return math.nan if isinstance(weight, str) else float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def check_unmerged(tuner: TangentModel) -> None:
    """Raises a `ValueError` if axes are merged into the base weights."""
    merged = sorted({name for layer in tangent_layers(tuner.model) for name in layer.merged_adapters})
    if merged:
        raise ValueError(
            f"Axes {merged} are merged into the base weights, so a mix can not change them. Call "
            "`model.unmerge_adapter()` first."
        )


def refuse_saved_modules(tuner: TangentModel, weights: Mapping[str, float]) -> None:
    """Raises a `ValueError` if an axis keeps modules of its own, to which no λ applies."""
    for name in weights:
        extra = tuner.peft_config[name].modules_to_save
        if extra:
            raise ValueError(
                f"Axis {name!r} keeps its own copy of the modules {extra}, which have no λ and do not mix. Activate "
                "that one axis and use `model.merge_and_unload()`."
            )


def check_saved_modules(tuner: TangentModel, weights: Mapping[str, float]) -> None:
    """Refuses a λ that modules which an axis keeps (`modules_to_save`) can not follow: they are on or off.

    Raises:
        ValueError: for such an axis at a λ other than 1, or two that keep the same module.
    """
    for name, weight in weights.items():
        extra = tuner.peft_config[name].modules_to_save
        if extra and weight != 1.0:
            raise ValueError(
                f"Axis {name!r} keeps its own copy of the modules {extra}, which have no λ, so λ = {weight:g} would "
                "mix its tangent with those modules in full. Give the axis λ = 1, leave it out of the mix to switch "
                "it off, or train it without `modules_to_save`."
            )
    for module_name, module in tuner.model.named_modules():
        keeping = [n for n in weights if isinstance(module, ModulesToSaveWrapper) and n in module.modules_to_save]
        if len(keeping) > 1:
            raise ValueError(
                f"Axes {keeping} each keep a copy of the module {module_name!r}, of which only one can run. Put one "
                "of them into the mix, or train them without `modules_to_save`."
            )


def activate(tuner: TangentModel, weights: Mapping[str, float]) -> None:
    """Makes `weights` the active mix; see `TangentModel.combine_axes`. The axes are frozen, as for inference."""
    checked = check_weights(tuner, weights)
    check_unmerged(tuner)
    check_saved_modules(tuner, checked)
    set_active(tuner, list(checked), inference_mode=True)
    set_scaling(tuner, checked)


def set_active(tuner: TangentModel, names: str | list[str], inference_mode: bool = False) -> None:
    """Activates adapters as PEFT does, and none of them for an empty list, which PEFT refuses to saved modules."""
    if names:
        BaseTuner.set_adapter(tuner, names, inference_mode=inference_mode)
        return
    for module in tuner.model.modules():
        if isinstance(module, (TangentLayer, AuxiliaryTrainingWrapper)):
            module.set_adapter([])
    tuner.active_adapter = []


def set_scaling(tuner: TangentModel, weights: Mapping[str, float]) -> None:
    """λ as given; 1 for every other axis, so that no weight of an earlier mix comes back when PEFT activates it."""
    for layer in tangent_layers(tuner.model):
        layer.tangent_scaling.update({name: weights.get(name, 1.0) for name in layer.tangent_scaling})


def active_weights(tuner: TangentModel) -> dict[str, float]:
    """λ of the active axes, those at 0 included; empty while adapters are disabled."""
    weights: dict[str, float] = {}
    for layer in tangent_layers(tuner.model):
        if not layer.disable_adapters:
            weights.update({n: layer.tangent_scaling[n] for n in layer.active_adapters if n in layer.tangent_scaling})
    return {name: weights[name] for name in tuner.peft_config if name in weights}


# ---- remembering and restoring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """λ of every adapter at every layer, which parameters train, and which axes will once they are enabled again."""

    scaling: list[tuple[TangentLayer, dict[str, float]]]
    trainable: list[tuple[nn.Parameter, bool]]
    suspended: list[tuple[TangentLayer, frozenset[str]]]


def snapshot(model: nn.Module) -> Snapshot:
    """What `restore_scaling` and `preserved` put back."""
    holders = [m for m in model.modules() if isinstance(m, (TangentLayer, AuxiliaryTrainingWrapper))]
    return Snapshot(
        [(layer, dict(layer.tangent_scaling)) for layer in tangent_layers(model)],
        [(parameter, parameter.requires_grad) for holder in holders for parameter in holder.parameters()],
        [(layer, layer.tangent_suspended) for layer in tangent_layers(model)],
    )


def restore_scaling(before: Snapshot) -> None:
    """Puts λ back for the adapters that existed at the snapshot and still do."""
    for layer, scaling in before.scaling:
        layer.tangent_scaling.update({n: scale for n, scale in scaling.items() if n in layer.tangent_scaling})


def restore_training(before: Snapshot) -> None:
    """Lets the parameters of the snapshot train, or not, as they did then."""
    for parameter, trains in before.trainable:
        parameter.requires_grad_(trains)
    for layer, suspended in before.suspended:
        layer.tangent_suspended = suspended


@contextmanager
def preserved(tuner: TangentModel) -> Iterator[None]:
    """Restores the active axes, their λ and what trains at the end of the block.

    If the axes that were active have been deleted inside, what is active instead stays; never the base alone.
    """
    check_unmerged(tuner)  # PEFT would unmerge on its way back
    before, active = snapshot(tuner.model), list(tuner.active_adapters)
    try:
        yield
    finally:
        left = [name for name in active if name in tuner.peft_config]
        if active and not left:
            left = list(tuner.active_adapters) or list(tuner.peft_config)[:1]
        set_active(tuner, left)
        restore_scaling(before)
        restore_training(before)


def delete(tuner: TangentModel, adapter_name: str) -> None:
    """Deletes an axis; see `TangentModel.delete_adapter`."""
    if adapter_name not in tuner.peft_config:
        raise ValueError(
            f"Unknown axis {adapter_name!r}; this model has {sorted(tuner.peft_config)}. Name one of them to delete."
        )
    active = list(tuner.active_adapters)
    if adapter_name not in active and len(active) <= 1:
        BaseTuner.delete_adapter(tuner, adapter_name)  # leaves the active axis alone
        return
    check_unmerged(tuner)
    before = snapshot(tuner.model)
    rest = [name for name in active if name != adapter_name]
    trained = trained_axes(tuner)
    if rest:
        set_active(tuner, [])  # PEFT deletes saved modules only where at most one axis is active
    BaseTuner.delete_adapter(tuner, adapter_name)
    set_active(tuner, rest or list(tuner.active_adapters), inference_mode=adapter_name not in trained)
    restore_scaling(before)
    if rest:
        restore_training(before)


def trained_axes(tuner: TangentModel) -> set[str]:
    """The axes of which a tangent trains, or will once the adapters are enabled again."""
    return {name for layer in tangent_layers(tuner.model) for name in layer.trained_adapters()}


# ---- storing a mix ---------------------------------------------------------------------------------------------------


def store(tuner: TangentModel, weights: Mapping[str, float], adapter_name: str) -> None:
    """Adds the adapter `adapter_name` with tangent Σ λᵢ τᵢ; see `TangentModel.combine_axes`."""
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


def mix_factors(tuner: TangentModel, weights: Mapping[str, float]) -> dict[str, TangentFactors]:
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


def _mixed_config(
    tuner: TangentModel, weights: Mapping[str, float], mixed: Mapping[str, TangentFactors]
) -> TangentConfig:
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
