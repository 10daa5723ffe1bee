"""λ, live: activating a mix of axes, reading it, restoring it.

A live mix is one number per axis and layer; no weight is touched. `stored.py` makes an adapter of a mix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.live import LiveMix, Rows, Weight
from tangent_peft.tuner.safe_range import range_of


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

SAFE_WEIGHT = 3.0  # TS-DPO reports that mixes break down beyond |λ| ≈ 3


def tangent_tuner(model: nn.Module) -> AxisVerbs:
    """The tuner inside a `PeftModel`, or itself.

    Raises:
        TypeError: if the model carries no tangent axes.
    """
    tuner = model.base_model if isinstance(model, PeftModel) else model
    if not isinstance(tuner, BaseTuner) or tuner.tuner_layer_cls is not TangentLayer:
        raise TypeError(
            f"Expected a PeftModel made with TangentConfig, found {type(model).__name__}. Wrap the model with "
            "`get_peft_model(model, TangentConfig(...))` or load axes with `PeftModel.from_pretrained`."
        )
    return cast("AxisVerbs", tuner)


def tangent_layers(model: nn.Module) -> Iterator[TangentLayer]:
    """The wrapped layers of `model`, in its order."""
    return (module for module in model.modules() if isinstance(module, TangentLayer))


def check_known(tuner: AxisVerbs, names: Iterable[str]) -> None:
    """Raises a `ValueError` for a name that is not an axis of this model."""
    for name in names:
        if name not in tuner.peft_config:
            raise ValueError(
                f"Unknown axis {name!r}; this model has {sorted(tuner.peft_config)}. Load it first with "
                f"`model.load_adapter(path, adapter_name={name!r})`."
            )


def check_finite(tuner: AxisVerbs, weights: Mapping[str, float]) -> dict[str, float]:
    """The mix as plain floats.

    Raises:
        ValueError: for an unknown axis, or a λ that is not a finite number.
    """
    check_known(tuner, weights)
    checked = {name: _as_number(weight) for name, weight in weights.items()}
    for name, value in checked.items():
        if not math.isfinite(value):
            raise ValueError(f"The weight of axis {name!r} is {weights[name]!r}; λ must be a finite number.")
    return checked


def check_weights(tuner: AxisVerbs, weights: Mapping[str, float]) -> dict[str, float]:
    """The mix as plain floats, with at most one warning for each axis.

    An axis with a stored safe range (`TangentConfig.safe_range`) is warned of where λ is outside of it, by that range.
    Every other λ beyond |λ| = 3 is warned of by TS-DPO's rule, also one that a stored range holds: the range says that
    merging changes little there, the rule that answers were seen to break down.

    Raises:
        ValueError: as `check_finite`.
    """
    checked = check_finite(tuner, weights)
    for name, value in checked.items():
        stored = range_of(tuner, name)
        if stored is not None and not stored.holds(value):
            warnings.warn(stored.warning(name, value), stacklevel=4)
        elif abs(value) > SAFE_WEIGHT:
            warnings.warn(
                f"λ = {value} for axis {name!r}: mixes beyond |λ| = {SAFE_WEIGHT:g} are outside the range in which "
                "TS-DPO was found to work; check the linearity gap and read the answers.",
                stacklevel=4,
            )
    return checked


def _as_number(weight: object) -> float:
    """A number of any library as a float; NaN for what is none."""
    try:
        return math.nan if isinstance(weight, str) else float(weight)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan


def check_unmerged(tuner: AxisVerbs) -> None:
    """Raises a `ValueError` if axes are merged into the base weights."""
    if not tuner.tangent_live.merged:
        return
    merged = sorted({name for layer in tangent_layers(tuner.model) for name in layer.merged_adapters})
    raise ValueError(
        f"Axes {merged} are merged into the base weights, so a mix can not change them. Call "
        "`model.unmerge_adapter()` first."
    )


def check_enabled(tuner: AxisVerbs) -> None:
    """Raises a `ValueError` if adapters are disabled."""
    if next(tangent_layers(tuner.model)).disable_adapters:
        raise ValueError(
            "Adapters are disabled, so every mix would be the base model. Call `model.enable_adapter_layers()` first, "
            "or leave the `with model.disable_adapter():` block."
        )


def refuse_saved_modules(tuner: AxisVerbs, names: Iterable[str]) -> None:
    """Raises a `ValueError` if an axis keeps modules of its own, to which no λ applies."""
    for name in names:
        extra = tuner.peft_config[name].modules_to_save
        if extra:
            raise ValueError(
                f"Axis {name!r} keeps its own copy of the modules {extra}, which have no λ and do not mix. Activate "
                "that one axis, and use `model.merge_and_unload()` where you want merged weights."
            )


def check_saved_modules(tuner: AxisVerbs, weights: Mapping[str, float]) -> None:
    """Refuses a λ that modules which an axis keeps (`modules_to_save`) can not follow: they are on or off.

    Raises:
        ValueError: for such an axis at a λ other than 1, or two that keep the same module.
    """
    if not any(tuner.peft_config[name].modules_to_save for name in weights):
        return
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


def activate(tuner: AxisVerbs, weights: Mapping[str, float]) -> None:
    """Makes `weights` the active mix; see `AxisVerbs.combine_axes`. The axes are frozen, as for inference."""
    checked = check_weights(tuner, weights)
    check_unmerged(tuner)
    check_saved_modules(tuner, checked)
    switch(tuner, checked)


def switch(tuner: AxisVerbs, weights: Mapping[str, Weight], rows: Rows | None = None) -> None:
    """Makes a checked mix the active one; with `rows`, one in which every row has its own.

    All layers read the same λ, so this takes as long for a large model as for a small one, unless something has to be
    frozen or switched first at every layer: axes that train, modules that axes keep.
    """
    live = tuner.tangent_live
    if is_light(tuner):
        live.active = tuner.active_adapter = list(weights)
    else:
        set_active(tuner, list(weights), inference_mode=True)
    live.set_weights(weights)
    live.rows = rows


def is_light(tuner: AxisVerbs) -> bool:
    """Whether nothing but λ distinguishes one mix from another: no axis trains, or keeps modules of its own."""
    return not tuner.tangent_live.training and not any(c.modules_to_save for c in tuner.peft_config.values())


def set_active(tuner: AxisVerbs, names: str | list[str], inference_mode: bool = False) -> None:
    """Activates adapters as PEFT does, and none of them for an empty list, which PEFT refuses to saved modules."""
    if names:
        BaseTuner.set_adapter(tuner, names, inference_mode=inference_mode)
    else:
        for module in tuner.model.modules():
            if isinstance(module, (TangentLayer, AuxiliaryTrainingWrapper)):
                module.set_adapter([])
        tuner.active_adapter = []
    if inference_mode or not names:
        tuner.tangent_live.training.clear()


def active_weights(tuner: AxisVerbs) -> dict[str, float]:
    """λ of the active axes, those at 0 included; empty while adapters are disabled."""
    live = tuner.tangent_live
    if next(tangent_layers(tuner.model)).disable_adapters:
        return {}
    return {name: live.uniform(name) for name in tuner.peft_config if name in live.active}


# ---- remembering and restoring ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """What is active, which parameters train, and which axes will once they are enabled again."""

    live: LiveMix
    trainable: list[tuple[nn.Parameter, bool]]
    suspended: list[tuple[TangentLayer, frozenset[str]]]


def snapshot(tuner: AxisVerbs) -> Snapshot:
    """What `restore_weights`, `restore_training` and `preserved` put back."""
    live = replace(tuner.tangent_live, training=set(tuner.tangent_live.training))
    if is_light(tuner):
        return Snapshot(live, [], [])
    holders = [m for m in tuner.model.modules() if isinstance(m, (TangentLayer, AuxiliaryTrainingWrapper))]
    return Snapshot(
        live,
        [(parameter, parameter.requires_grad) for holder in holders for parameter in holder.parameters()],
        [(layer, layer.tangent_suspended) for layer in tangent_layers(tuner.model)],
    )


def restore_weights(tuner: AxisVerbs, before: Snapshot) -> None:
    """Puts λ back for the adapters that existed at the snapshot and still do, and how rows have it."""
    live = tuner.tangent_live
    live.weights = {name: before.live.weights.get(name, weight) for name, weight in live.weights.items()}
    live.rows = before.live.rows


def restore_training(tuner: AxisVerbs, before: Snapshot) -> None:
    """Lets the parameters of the snapshot train, or not, as they did then."""
    for parameter, trains in before.trainable:
        parameter.requires_grad_(trains)
    for layer, suspended in before.suspended:
        layer.tangent_suspended = suspended
    tuner.tangent_live.training |= before.live.training


@contextmanager
def preserved(tuner: AxisVerbs) -> Iterator[None]:
    """Restores the active axes, their λ and what trains at the end of the block.

    If the axes that were active have been deleted inside, what is active instead stays; never the base alone.
    """
    check_unmerged(tuner)  # PEFT would unmerge on its way back
    before = snapshot(tuner)
    try:
        yield
    finally:
        left = [name for name in before.live.active if name in tuner.peft_config]
        if before.live.active and not left:
            left = list(tuner.active_adapters) or list(tuner.peft_config)[:1]
        if is_light(tuner) and not before.live.training:
            tuner.tangent_live.active = tuner.active_adapter = left
        else:
            set_active(tuner, left, inference_mode=not before.live.training)
        restore_weights(tuner, before)
        restore_training(tuner, before)


def delete(tuner: AxisVerbs, adapter_name: str) -> None:
    """Deletes an axis; see `AxisVerbs.delete_adapter`."""
    if adapter_name not in tuner.peft_config:
        raise ValueError(
            f"Unknown axis {adapter_name!r}; this model has {sorted(tuner.peft_config)}. Name one of them to delete."
        )
    active = list(tuner.active_adapters)
    if adapter_name not in active and len(active) <= 1:
        BaseTuner.delete_adapter(tuner, adapter_name)  # leaves the active axis alone
        return
    check_unmerged(tuner)
    before = snapshot(tuner)
    rest = [name for name in active if name != adapter_name]
    trained = trained_axes(tuner)
    if rest:
        set_active(tuner, [])  # PEFT deletes saved modules only where at most one axis is active
    BaseTuner.delete_adapter(tuner, adapter_name)
    set_active(tuner, rest or list(tuner.active_adapters), inference_mode=adapter_name not in trained)
    restore_weights(tuner, before)
    if rest:
        restore_training(tuner, before)


def trained_axes(tuner: AxisVerbs) -> set[str]:
    """The axes of which a tangent trains, or will once the adapters are enabled again."""
    return {name for layer in tangent_layers(tuner.model) for name in layer.trained_adapters()}
