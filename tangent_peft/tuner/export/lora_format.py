"""The factors B·A of tangents in the names and layouts of PEFT's LoRA, layer by layer.

linear, Conv1D       lora_B (out, r), lora_A (r, in)
embedding            lora_embedding_B (D, r), lora_embedding_A (r, V)
fused experts        lora_B (out, r·E), lora_A (E·r, in): PEFT's `ParamWrapper`, one for each parameter named in
                     `target_parameters`, nested in the order in which the module has them
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from tangent_peft.tuner.embedding import TangentEmbedding
from tangent_peft.tuner.experts import TangentExperts
from tangent_peft.tuner.layer import TangentLayer


Factors = tuple[Tensor, Tensor]  # B (…, out, r) and A (…, r, in)


def lora_state(layers: Iterable[TangentLayer], pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The state dict of a LoRA adapter file.

    Args:
        layers: the wrapped layers.
        pairs: (B, A) by layer name, for those to be written.

    Raises:
        ValueError: for the fused weight of a single expert.
    """
    state = {}
    for layer in layers:
        if layer.layer_name in pairs:
            for name, value in _entries(layer, *pairs[layer.layer_name], pairs).items():
                state[f"base_model.model.{name}"] = value.detach().cpu().contiguous().clone()
    return state


def _entries(layer: TangentLayer, b: Tensor, a: Tensor, pairs: Mapping[str, Factors]) -> dict[str, Tensor]:
    if isinstance(layer, TangentEmbedding):
        return {f"{layer.layer_name}.lora_embedding_B": b, f"{layer.layer_name}.lora_embedding_A": a}
    if not isinstance(layer, TangentExperts):
        return {f"{layer.layer_name}.lora_B.weight": b, f"{layer.layer_name}.lora_A.weight": a}
    if layer.leading == (1,):
        raise ValueError(
            f"{layer.layer_name!r} holds a single expert, which PEFT's LoRA takes for an ordinary layer and merges in "
            "another layout. Use `export_merged`."
        )
    a = a.expand(*layer.leading, *a.shape[-2:])
    owner: nn.Module = layer.get_base_layer()
    if layer.transposed and "is_transposed" not in vars(owner):  # PEFT then takes the inputs for the outputs
        b, a = a.mT, b.mT
    name = _wrapper_name(layer, pairs)
    return {
        f"{name}.lora_B.weight": b.permute(1, 2, 0).reshape(b.shape[1], -1),
        f"{name}.lora_A.weight": a.reshape(-1, a.shape[2]),
    }


def _wrapper_name(layer: TangentExperts, pairs: Mapping[str, Factors]) -> str:
    """The module's name, and a `base_layer` for each wrapper around this one: those of the parameters after it."""
    owner = layer.layer_name.rpartition(".")[0]
    names = [f"{owner}.{name}" for name, _ in layer.get_base_layer().named_parameters(recurse=False)]
    outer = [name for name in names[names.index(layer.layer_name) + 1 :] if name in pairs]
    return owner + ".base_layer" * len(outer)
