"""Which base model an axis belongs to, told by a small sample of its weights.

A tangent is a direction at one point θ₀; at another base of the same shape it means nothing, and nothing would fail.
The sample survives casting to half precision, so it is compared with a tolerance instead of hashed. It does not see a
fine-tuning that moved the sampled weights by less than that, nor quantized weights, for which there is no check.
"""

from __future__ import annotations

import base64

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tangent_peft.forward import full_shape, gathered
from tangent_peft.tuner.registration import PREFIX


TENSORS = 32  # weight matrices sampled
ENTRIES = 4  # entries of each
TOLERANCE = 5e-3  # relative; bfloat16 rounding is below 2e-3


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The base model's matrices by their names before any wrapping, adapters and saved copies left out."""
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): parameter
        for name, parameter in model.named_parameters()
        if len(full_shape(parameter)) >= 2 and f".{PREFIX}" not in name and ".modules_to_save." not in name
    }


def fingerprint(model: nn.Module) -> str | None:
    """A sample of `TENSORS × ENTRIES` base weights, base64 of float16; `None` if they can not be read here.

    They can not where they are quantized, on the meta device or split by FSDP. What ZeRO-3 has partitioned is gathered,
    a matrix at a time and by all processes together.
    """
    weights = base_weights(model)
    if not weights or not all(_is_readable(weight) for weight in weights.values()):
        return None
    names = sorted(weights)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, TENSORS).round().astype(int))]
    sample = [_entries(weights[name]) for name in chosen]
    return base64.b64encode(torch.cat(sample).numpy().tobytes()).decode()


def _is_readable(weight: Tensor) -> bool:
    sizable = full_shape(weight).numel() >= ENTRIES
    return weight.is_floating_point() and not weight.is_meta and not isinstance(weight, DTensor) and sizable


def _entries(weight: Tensor) -> Tensor:
    with gathered([weight]):
        return _sample(weight.detach().reshape(-1))


def _sample(flat: Tensor) -> Tensor:
    index = torch.linspace(0, flat.numel() - 1, ENTRIES, dtype=torch.float64).round().long()
    return flat[index.to(flat.device)].to("cpu", torch.float16)


def check_fingerprint(recorded: str | None, model: nn.Module, adapter_name: str) -> None:
    """Compares the fingerprint recorded with an axis to the model it is being loaded on.

    Raises:
        ValueError: if the base weights differ by more than `TOLERANCE`.
    """
    present = fingerprint(model)
    if recorded is None or present is None:
        return
    expected, found = (_decode(text) for text in (recorded, present))
    if expected.shape == found.shape:
        difference = float(np.linalg.norm(expected - found)) / max(float(np.linalg.norm(expected)), 1e-12)
        if difference <= TOLERANCE:
            return
        detail = f"its sampled weights differ by {difference:.1%}"
    else:
        detail = f"it has other layers ({found.size} sampled weights instead of {expected.size})"
    raise ValueError(
        f"Axis {adapter_name!r} was trained on another base model than this {type(model).__name__}: {detail}. A "
        "tangent is a direction at one base and means nothing at another. Load the base named in "
        "`base_model_name_or_path` of its adapter_config.json; to load it here all the same, set `base_fingerprint` to "
        "null in that file."
    )


def _decode(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float16).astype(np.float64)
