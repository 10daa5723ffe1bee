"""θ(λ) as an ordinary transformers model: safetensors in the base's dtype, config, tokenizer, generation config.

The model in memory is not changed. This deploys the network at θ₀ + Σ λᵢ τᵢ, as the paper does; it is not f_lin. How
far apart the two are is the linearity gap, which every export states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.tuner.axes import active_weights, check_unmerged, check_weights, refuse_saved_modules, tangent_layers
from tangent_peft.tuner.backends import unpack_state
from tangent_peft.tuner.export.atomic import check_place, fresh_folder
from tangent_peft.tuner.export.calibration import CalibrationData, calibrate, warn_of_gap
from tangent_peft.tuner.export.card import write_card
from tangent_peft.tuner.export.record import RECORD, MergedExport, base_names, describe_axes, describe_base
from tangent_peft.tuner.export.tokenizer import Tokenizer, find_tokenizer
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.registration import PREFIX
from tangent_peft.tuner.rounding import Rounding
from tangent_peft.tuner.stored import check_tangents


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs


@dataclass(frozen=True)
class MergedOptions:
    """How `export_merged` writes; see `AxisVerbs.export_merged`."""

    tokenizer: Tokenizer | None = None
    max_shard_size: int | str = "5GB"
    overwrite: bool = False
    calibration: CalibrationData = True


def export_merged(tuner: AxisVerbs, path: Path, weights: dict[str, float], options: MergedOptions) -> MergedExport:
    """Saves the network at θ(λ) as an ordinary transformers model; see `AxisVerbs.export_merged`."""
    check_output(tuner, path, options.overwrite)
    base = transformers_base(tuner)
    calibration = calibrate(tuner, weights, options.calibration)
    rounding = Rounding()
    with fresh_folder(path, options.overwrite, RECORD) as folder:
        tokenizer = write_model(tuner, folder, weights, options, tangent_layers(base), rounding)
        export = MergedExport(
            path=path,
            weights=weights,
            axes=describe_axes(tuner, weights),
            base=describe_base(tuner),
            calibration=calibration,
            rounding=rounding,
            tokenizer=tokenizer is not None,
        )
        write_card(folder, export)
        export.write_record(folder)
    warn_of_gap(tuner, calibration, stacklevel=4)
    rounding.warn(stacklevel=4)
    return export


def transformers_base(tuner: AxisVerbs) -> PreTrainedModel:
    """The base model.

    Raises:
        ValueError: if it is no transformers model.
    """
    base = tuner.model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`export_merged` writes a transformers model, but the base is a {type(base).__name__}. Use "
            "`model.merge_and_unload()` and save its state dict."
        )
    return base


def chosen_mix(tuner: AxisVerbs, weights: Mapping[str, float] | None) -> dict[str, float]:
    """The mix to export; the active one for `None`.

    Raises:
        ValueError: while adapters are disabled, for a merged model, an unknown axis, a λ or a tangent that is not
            finite, or an axis that keeps extra modules.
    """
    if any(layer.disable_adapters for layer in tangent_layers(tuner.model)):
        raise ValueError(
            "Adapters are disabled, so what is measured for the export would be the base model. Export after the "
            "`with model.disable_adapter():` block, or call `model.enable_adapter_layers()` first."
        )
    check_unmerged(tuner)
    chosen = check_weights(tuner, active_weights(tuner) if weights is None else weights)
    refuse_saved_modules(tuner, chosen)
    check_tangents(tuner, chosen)
    return chosen


def check_output(tuner: AxisVerbs, path: Path, overwrite: bool) -> None:
    """Whether an export may be written to `path`, before any work is done for it.

    Raises:
        FileExistsError: as `check_place`, or if the base model lies in `path`.
        ValueError: as `check_place`.
    """
    check_place(path, overwrite, RECORD)
    place = path.resolve()
    for name in base_names(tuner):
        source = Path(name).resolve()
        if source.exists() and source.is_relative_to(place):
            raise FileExistsError(
                f"The base model {name!r}, on which the axes rest, lies in {path}, so `overwrite=True` does not "
                "replace it. Name another folder."
            )


def write_model(
    tuner: AxisVerbs,
    folder: Path,
    weights: Mapping[str, float],
    options: MergedOptions,
    layers: Iterable[TangentLayer],
    rounding: Rounding,
) -> Tokenizer | None:
    """Writes the base model with the mix added to the weights of `layers`, and its tokenizer, which is returned.

    What rounding the weights left of the mix is counted into `rounding`.

    Raises:
        ValueError: if a quantized layer can not be dequantized, or the base is wrapped by something unknown.
    """
    base = transformers_base(tuner)
    state = _merged_state(tuner, base, weights, layers, rounding)
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)  # what is written is dequantized
    if not _same_head(base, state):
        for settings in (config, config.get_text_config()):  # a vision-language model may have it in either
            if vars(settings).get("tie_word_embeddings"):
                settings.tie_word_embeddings = False
    with torch.device("meta"):
        merged = type(base)(config)
    merged.load_state_dict(state, assign=True, strict=False)
    merged.tie_weights()
    empty = [name for name, parameter in merged.named_parameters() if parameter.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} weights of {type(base).__name__} have no value to export, for example {empty[0]!r}: the "
            "base is wrapped in a way that `export_merged` does not know. Use `model.merge_and_unload()` and save that."
        )
    if base.can_generate():
        merged.generation_config = base.generation_config
    merged.save_pretrained(folder, max_shard_size=options.max_shard_size)
    tokenizer = options.tokenizer if options.tokenizer is not None else find_tokenizer(base)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _same_head(base: PreTrainedModel, state: Mapping[str, Tensor]) -> bool:
    """Whether head and input embedding have one weight in a state dict; true of a model without either."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if head is None or embedding is None:
        return True
    names = {id(module): name for name, module in base.named_modules()}
    return state[f"{names[id(head)]}.weight"] is state[f"{names[id(embedding)]}.weight"]


@torch.no_grad()
def _merged_state(
    tuner: AxisVerbs,
    base: PreTrainedModel,
    weights: Mapping[str, float],
    layers: Iterable[TangentLayer],
    rounding: Rounding,
) -> dict[str, Tensor]:
    """The base model's state dict at θ(λ), under its original names; untouched tensors are shared, not copied."""
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in tuner.model.state_dict(keep_vars=True).items()
        if f".{PREFIX}" not in name and ".modules_to_save." not in name
    }
    unpack_state(base, state)
    for layer in layers:
        present = {name: scale for name, scale in weights.items() if name in layer.tangent_r and scale != 0.0}
        if present:
            key = layer.weight_name
            updated = layer.updated_weight(present, state[key].dtype, rounding)
            state[key] = nn.Parameter(updated, requires_grad=False)
    return state
