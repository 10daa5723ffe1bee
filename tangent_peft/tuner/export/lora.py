"""θ(λ) − θ₀ as a plain LoRA that stock PEFT and LoRA servers load.

Low-rank tangents are exact at their own rank; dense ones are approximated by SVD, and the error is computed and stated.
Every layer has the same rank, padded with zeros, because servers differ in whether they follow a rank per layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from peft import LoraConfig
from safetensors.torch import save_file

from tangent_peft.tuner.axes import tangent_layers
from tangent_peft.tuner.decompose import Pair, Rank, check_rank, decompose, pad, relative, shared_rank, squared_errors
from tangent_peft.tuner.embedding import TangentEmbedding
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.export.atomic import fresh_folder
from tangent_peft.tuner.export.calibration import CalibrationData, calibrate, warn_of_gap
from tangent_peft.tuner.export.card import write_card
from tangent_peft.tuner.export.loadable import check_called, loadable
from tangent_peft.tuner.export.lora_format import lora_state
from tangent_peft.tuner.export.merged import MergedOptions, check_output, transformers_base, write_model
from tangent_peft.tuner.export.record import RECORD, LoraExport, describe_axes, describe_base
from tangent_peft.tuner.export.servers import Contents, Server, check_contents, check_server, served_rank, vllm_rank
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.rounding import Rounding
from tangent_peft.tuner.stored import mix_factors, without_zeros
from tangent_peft.tuner.targets import head_name
from tangent_peft.tuner.weights import TangentFactors


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs

Head: TypeAlias = Literal["keep", "merge", "refuse"]


@dataclass(frozen=True)
class LoraOptions:
    """How `export_lora` writes; see `AxisVerbs.export_lora`."""

    rank: Rank = None
    head: Head = "keep"
    server: Server | None = None
    overwrite: bool = False
    calibration: CalibrationData = True

    def __post_init__(self) -> None:
        check_rank(self.rank)
        check_server(self.server)
        if self.head not in get_args(Head):
            raise ValueError(f"`head` is one of {get_args(Head)}, found {self.head!r}.")


@dataclass(frozen=True)
class _Plan:
    """What goes where, known before anything is written.

    `merged` are the layers whose tangent goes into a base model beside the LoRA; `pairs` what the LoRA holds.
    """

    merged: list[TangentLayer]
    pairs: dict[str, Pair]
    errors: dict[str, tuple[float, float]]
    rank: int
    head: str


def export_lora(tuner: AxisVerbs, path: Path, weights: dict[str, float], options: LoraOptions) -> LoraExport:
    """Saves θ(λ) − θ₀ as a LoRA directory that stock PEFT loads without this package; see `AxisVerbs.export_lora`."""
    check_output(tuner, path, options.overwrite)
    plan = _plan(tuner, weights, options)
    calibration = calibrate(tuner, weights, options.calibration)
    missed, total = (sum(squares) for squares in zip(*plan.errors.values(), strict=True))
    export = LoraExport(
        path=path,
        weights=weights,
        axes=describe_axes(tuner, weights),
        base=describe_base(tuner),
        calibration=calibration,
        rounding=Rounding(),
        rank=plan.rank,
        relative_error=relative(missed, total),
        layer_errors={name: relative(*squares) for name, squares in plan.errors.items()},
        head=plan.head,
        server=options.server,
    )
    state = lora_state(tangent_layers(tuner.model), plan.pairs)
    config = loadable(tuner.model, _lora_config(tuner, export, plan), state)
    with fresh_folder(path, options.overwrite, RECORD) as folder:
        save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        if plan.merged:
            (folder / "base").mkdir()
            write_model(tuner, folder / "base", weights, MergedOptions(), plan.merged, export.rounding)
        write_card(folder, export)
        export.write_record(folder)
    warn_of_gap(tuner, calibration, stacklevel=4)
    export.rounding.warn(stacklevel=4)
    return export


# ---- what goes where -------------------------------------------------------------------------------------------------


@torch.no_grad()
def _plan(tuner: AxisVerbs, weights: Mapping[str, float], options: LoraOptions) -> _Plan:
    mixed = mix_factors(tuner, without_zeros(weights))
    if not mixed:
        raise ValueError("The mix to export is empty; name at least one axis in `weights`.")
    layers = [layer for layer in tangent_layers(tuner.model) if layer.layer_name in mixed]
    vocabulary = vocabulary_layers(tuner, layers)
    merged = vocabulary if options.head == "merge" else []
    kept = [layer for layer in layers if layer not in merged]
    _check_head(vocabulary, options.head)
    if not kept:
        raise ValueError(
            f"The mix has tangents on {[layer.layer_name for layer in merged]} only, which `head='merge'` puts into a "
            "base model; nothing is left for a LoRA. Use `export_merged`."
        )
    experts = [layer for layer in kept if isinstance(layer, TangentExperts)]
    left = [layer for layer in vocabulary if layer in kept]
    check_contents(Contents(type(tuner.model).__name__, left, experts), options.server)
    if merged:
        transformers_base(tuner)
    check_called(tuner, weights, kept)
    _warn_of_ties(left)
    factors = {layer.layer_name: mixed[layer.layer_name] for layer in kept}
    pairs, errors = _factorize(factors, options)
    rank = served_rank(max(a.shape[-2] for _, a in pairs.values()), options.server)
    padded = {name: pad(pair, rank) for name, pair in pairs.items()}
    return _Plan(merged, padded, errors, rank, "merged" if merged else "kept" if vocabulary else "none")


def _factorize(
    factors: Mapping[str, TangentFactors], options: LoraOptions
) -> tuple[dict[str, Pair], dict[str, tuple[float, float]]]:
    rank = shared_rank(factors.values(), options.rank)
    if rank is not None and options.server == "vllm":
        rank = vllm_rank(rank) or rank  # what would be padding is used for a smaller error
    pairs = {name: decompose(tangent, rank) for name, tangent in factors.items()}
    return pairs, squared_errors(factors, pairs)


def vocabulary_layers(tuner: AxisVerbs, layers: Iterable[TangentLayer]) -> list[TangentLayer]:
    """The head and the input embeddings among wrapped layers, which servers treat apart from all others."""
    head = head_name(tuner.model)
    return [layer for layer in layers if isinstance(layer, TangentEmbedding) or layer.layer_name == head]


def _check_head(vocabulary: list[TangentLayer], head: Head) -> None:
    if head == "refuse" and vocabulary:
        raise ValueError(
            f"{[layer.layer_name for layer in vocabulary]} have tangents, and `head='refuse'` was given. Pass "
            "`head='keep'` for factors in the LoRA, `head='merge'` for a base model with them in its weights, or train "
            "with `TangentConfig(lm_head=False)`."
        )


def _warn_of_ties(kept: Iterable[TangentLayer]) -> None:
    for layer in kept:
        if layer.tangent_tied:
            kind, other = layer.tied_kinds()
            warnings.warn(
                f"The {kind} {layer.layer_name!r} is tied to the {other}: run this LoRA as an adapter. Merging it with "
                f"stock PEFT (`merge_and_unload`) would change the {other} as well; to get merged weights, use "
                "`export_merged`, or `head='merge'` for a LoRA that can be merged.",
                stacklevel=6,
            )


def _lora_config(tuner: AxisVerbs, export: LoraExport, plan: _Plan) -> LoraConfig:
    fused = {layer.layer_name for layer in tangent_layers(tuner.model) if isinstance(layer, TangentExperts)}
    source = tuner.peft_config[next(iter(export.weights))]
    base = export.base_path
    return LoraConfig(
        r=plan.rank,
        lora_alpha=plan.rank,
        target_modules=sorted(set(plan.pairs) - fused),
        target_parameters=sorted(set(plan.pairs) & fused) or None,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path if base is None else str(base),
        inference_mode=True,
    )
