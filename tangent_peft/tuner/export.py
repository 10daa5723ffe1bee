"""θ(λ) for other software: as an ordinary model, or as a plain LoRA that stock PEFT and LoRA servers load.

Both deploy the ordinary network at θ₀ + Σ λᵢ τᵢ, as the paper does; it is not f_lin. How far apart the two are is the
linearity gap (`tangent_peft.diagnose.linearity_gap`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tangent_peft.tuner.axes import active_weights, check_weights, refuse_saved_modules, tangent_layers
from tangent_peft.tuner.backends import unpack_state
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.lora_format import lora_state
from tangent_peft.tuner.registration import PREFIX
from tangent_peft.tuner.stored import mix_factors
from tangent_peft.tuner.weights import TangentFactors


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs


@dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Attributes:
        path: the adapter directory.
        rank: rank of the LoRA.
        relative_error: ‖ΔW_LoRA − ΔW‖ / ‖ΔW‖ over all layers (Frobenius); 0 for a low-rank tangent at its own rank.
    """

    path: Path
    rank: int
    relative_error: float


def export_merged(
    tuner: AxisVerbs, path: Path, weights: Mapping[str, float] | None, tokenizer: PreTrainedTokenizerBase | None
) -> None:
    """Saves the network at θ(λ) as an ordinary transformers model; the model in memory is not changed.

    Args:
        tuner: the wrapped model.
        path: directory to write: safetensors, config, generation config and, if given, the tokenizer.
        weights: λ by axis; `None` exports the active mix.
        tokenizer: saved beside the model.

    A quantized base is written dequantized, in the dtype of its config: what is exported is the very base that the axes
    were run on, plus their τ, without quantizing again.

    Raises:
        ValueError: if the base is not a transformers model, an axis keeps extra modules (`modules_to_save`), or a
            quantized layer can not be dequantized.
    """
    base = tuner.model
    if not isinstance(base, PreTrainedModel):
        raise ValueError(
            f"`export_merged` writes a transformers model, but the base is a {type(base).__name__}. Use "
            "`model.merge_and_unload()` and save its state dict."
        )
    chosen = _chosen(tuner, weights)
    refuse_saved_modules(tuner, chosen)
    path.mkdir(parents=True, exist_ok=True)  # transformers only logs that the path is a file
    state = _merged_state(tuner, base, chosen)
    config = copy.deepcopy(base.config)
    vars(config).pop("quantization_config", None)  # what is written is dequantized
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    if head is not None and embedding is not None and config.get_text_config().tie_word_embeddings:
        same = state[f"{names[id(head)]}.weight"] is state[f"{names[id(embedding)]}.weight"]
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = bool(same)
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
    merged.generation_config = base.generation_config
    merged.save_pretrained(path)
    if tokenizer is not None:
        tokenizer.save_pretrained(path)


def _chosen(tuner: AxisVerbs, weights: Mapping[str, float] | None) -> dict[str, float]:
    if any(layer.merged for layer in tangent_layers(tuner.model)):
        raise ValueError("Axes are merged into the base weights. Call `model.unmerge_adapter()` before exporting.")
    return check_weights(tuner, active_weights(tuner) if weights is None else weights)


@torch.no_grad()
def _merged_state(tuner: AxisVerbs, base: PreTrainedModel, weights: Mapping[str, float]) -> dict[str, Tensor]:
    """The base model's state dict at θ(λ), under its original names; untouched tensors are shared, not copied."""
    state = {
        name.replace(".base_layer", "").replace(".original_module", ""): value
        for name, value in tuner.model.state_dict(keep_vars=True).items()
        if f".{PREFIX}" not in name and ".modules_to_save." not in name
    }
    unpack_state(base, state)
    for layer in tangent_layers(tuner.model):
        present = {name: scale for name, scale in weights.items() if name in layer.tangent_r and scale != 0.0}
        weight = layer.get_base_weight()
        for name, scale in present.items():
            delta = layer.delta(name, scale)
            weight = weight + layer._layout(delta).to(weight.device, weight.dtype)
        if present:
            key = layer.weight_name
            state[key] = nn.Parameter(weight.to(state[key].dtype), requires_grad=False)
    return state


def export_lora(tuner: AxisVerbs, path: Path, weights: Mapping[str, float] | None, rank: int | None) -> LoraExport:
    """Saves θ(λ) − θ₀ as a LoRA directory that stock PEFT loads without this package.

    Args:
        tuner: the wrapped model.
        path: directory to write.
        weights: λ by axis; `None` exports the active mix.
        rank: rank of the LoRA. `None`: the rank of the mix, exact, for low-rank axes; 16 for dense ones. A smaller rank
            is the best approximation, by SVD.

    On a head or embedding that are tied to each other the LoRA is right as an adapter, but stock PEFT's
    `merge_and_unload` adds it to the other one as well; a warning says so, and `export_merged` has no such limit.

    Returns:
        The rank and the relative error of the LoRA.

    Raises:
        ValueError: for an empty mix, a rank below 1, or an axis that keeps extra modules.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"`rank` is a positive integer, or None for the rank of the mix; found {rank}.")
    chosen = _chosen(tuner, weights)
    refuse_saved_modules(tuner, chosen)
    with torch.no_grad():
        mixed = mix_factors(tuner, chosen)
        if not mixed:
            raise ValueError("The mix to export is empty; name at least one axis in `weights`.")
        pairs = {name: lora_factors(factors, rank) for name, factors in mixed.items()}
        error = _relative_error(mixed, pairs)
    _warn_of_tied_head(tuner, pairs)
    state = lora_state(tangent_layers(tuner.model), pairs)
    ranks = {name: a.shape[-2] for name, (_, a) in pairs.items()}
    r = max(ranks.values())
    fused = {layer.layer_name for layer in tangent_layers(tuner.model) if isinstance(layer, TangentExperts)}
    source = tuner.peft_config[next(iter(chosen))]
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(set(pairs) - fused),
        target_parameters=sorted(set(pairs) & fused) or None,
        rank_pattern={name.replace(".", r"\."): k for name, k in ranks.items() if k != r},
        alpha_pattern={name.replace(".", r"\."): k for name, k in ranks.items() if k != r},
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
    )
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(path))
    save_file(state, path / "adapter_model.safetensors", metadata={"format": "pt"})
    return LoraExport(path, r, error)


def _warn_of_tied_head(tuner: AxisVerbs, exported: Mapping[str, object]) -> None:
    for layer in tangent_layers(tuner.model):
        if layer.tangent_tied and layer.layer_name in exported:
            kind, other = layer.tied_kinds()
            warnings.warn(
                f"The {kind} {layer.layer_name!r} is tied to the {other}: run this LoRA as an adapter. Merging it with "
                f"stock PEFT (`merge_and_unload`) would change the {other} as well; to get merged weights, use "
                "`export_merged`.",
                stacklevel=4,
            )


def lora_factors(factors: TangentFactors, rank: int | None) -> tuple[Tensor, Tensor]:
    """(B, A) with B·A = ΔW (…, out, in), of at most `rank` columns each; the best approximation of a higher rank."""
    if factors.a is not None and factors.b is not None:
        own = factors.a.shape[-2]
        if rank is None or rank >= own:
            return factors.b, factors.a
        # ΔW = B·A with A = L·Q, so the singular values of B·L are those of ΔW.
        q, triangle = torch.linalg.qr(_at_least_single(factors.a).mT)
        u, s, vh = torch.linalg.svd(_at_least_single(factors.b) @ triangle.mT, full_matrices=False)
        return u[..., :rank] * s[..., None, :rank], vh[..., :rank, :] @ q.mT
    assert factors.dense is not None
    kept = min(16 if rank is None else rank, *factors.dense.shape[-2:])
    u, s, vh = torch.linalg.svd(_at_least_single(factors.dense), full_matrices=False)
    return u[..., :kept] * s[..., None, :kept], vh[..., :kept, :]


def _at_least_single(value: Tensor) -> Tensor:
    """In float32, where it is of half precision: torch decomposes no such matrices."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _relative_error(mixed: Mapping[str, TangentFactors], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> float:
    missed = total = 0.0
    for name, factors in mixed.items():
        if factors.a is not None and factors.b is not None and pairs[name][1] is factors.a:
            total += float(_at_least_single(factors.b @ factors.a).square().sum())
            continue
        delta = _at_least_single(factors.product())
        b, a = pairs[name]
        missed += float((delta - b @ a).square().sum())
        total += float(delta.square().sum())
    return (missed / total) ** 0.5 if total else 0.0
