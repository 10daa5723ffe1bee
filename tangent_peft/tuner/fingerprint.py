"""Which base model an axis belongs to, told by a small sample of its weights and by how these are quantized.

A tangent is a direction at one point θ₀; at another base of the same shape it means nothing, and nothing would fail.
The sample survives casting to half precision, so it is compared with a tolerance instead of hashed. It does not see a
fine-tuning that moved the sampled weights by less than that.

Quantized weights are sampled dequantized. An axis that was trained on a quantized base may be wanted on the same base
in another precision (train on 4 bits, deploy in bfloat16): weights that differ by no more than a quantization does are
taken for the same base, with a warning. Layers that can not be dequantized leave no fingerprint, and no check.
"""

from __future__ import annotations

import base64
import warnings
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tangent_peft.forward import full_shape, gathered
from tangent_peft.tuner.backends import quantized_layers, reader, scheme
from tangent_peft.tuner.registration import PREFIX


TENSORS = 32  # weight matrices sampled
ENTRIES = 4  # entries of each
TOLERANCE = 5e-3  # relative; bfloat16 rounding is below 2e-3
SAME_SCHEME = 3e-2  # quantized twice in the same way, where kernels and packings round the scales differently
OTHER_SCHEME = 0.5  # 4 bits are off by 0.1, 2 bits by up to 0.4; an unrelated base is off by 1.4
FULL_PRECISION = "full precision"


Sample: TypeAlias = Callable[[], Tensor]


def base_weights(model: nn.Module) -> tuple[dict[str, Sample], str] | None:
    """How to sample the base model's matrices, by their names before any wrapping, and how they are quantized.

    Adapters and saved copies are left out. A quantized matrix is dequantized when it is sampled; what ZeRO-3 has
    partitioned is gathered, a matrix at a time and by all processes together. `None` if they can not be read here:
    where they can not be dequantized, are on the meta device or split by FSDP.
    """
    packed: dict[str, Sample] = {}
    schemes = set()
    for name, module, backend in quantized_layers(model):
        read = reader(module, backend)
        if read is None or any(
            p.is_meta or p.numel() < ENTRIES for p in module.parameters(recurse=False) if p.ndim > 1
        ):
            return None
        packed[name] = partial(_sample_dequantized, partial(read, module))
        schemes.add(scheme(module, backend))
    weights = {f"{name}.weight": read for name, read in packed.items()}
    for name, parameter in model.named_parameters():
        original = name.replace(".base_layer", "").replace(".original_module", "")
        foreign = f".{PREFIX}" in name or ".modules_to_save." in name or original.rpartition(".")[0] in packed
        if len(full_shape(parameter)) < 2 or foreign:
            continue
        if not _is_readable(parameter):
            return None
        weights[original] = partial(_sample_gathered, parameter)
    return weights, " + ".join(sorted(schemes)) or FULL_PRECISION


def fingerprint(model: nn.Module) -> str | None:
    """A sample of `TENSORS × ENTRIES` base weights, base64 of float16, after the scheme and a colon if quantized.

    `None` if they can not be read here.
    """
    found = base_weights(model)
    if found is None or not found[0]:
        return None
    weights, kind = found
    names = sorted(weights)
    chosen = [names[i] for i in np.unique(np.linspace(0, len(names) - 1, TENSORS).round().astype(int))]
    sample = [weights[name]() for name in chosen]
    text = base64.b64encode(torch.cat(sample).numpy().tobytes()).decode()
    return text if kind == FULL_PRECISION else f"{kind}:{text}"


def _is_readable(weight: Tensor) -> bool:
    sizable = full_shape(weight).numel() >= ENTRIES
    return weight.is_floating_point() and not weight.is_meta and not isinstance(weight, DTensor) and sizable


def _sample_gathered(weight: Tensor) -> Tensor:
    with gathered([weight]):
        return _sample(weight)


def _sample_dequantized(read: Callable[[], Tensor]) -> Tensor:
    return _sample(read())


def _sample(weight: Tensor) -> Tensor:
    flat = weight.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, ENTRIES, dtype=torch.float64).round().long()
    return flat[index.to(flat.device)].to("cpu", torch.float16)


def check_fingerprint(recorded: str | None, model: nn.Module, adapter_name: str) -> None:
    """Compares the fingerprint recorded with an axis to the model it is being loaded on.

    The same base in another precision is accepted with a warning.

    Raises:
        ValueError: if the base weights differ by more than their precisions explain.
    """
    present = fingerprint(model)
    if recorded is None or present is None:
        return
    (trained_on, expected), (loaded_on, found) = _decode(recorded), _decode(present)
    if expected.shape == found.shape:
        difference = float(np.linalg.norm(expected - found)) / max(float(np.linalg.norm(expected)), 1e-12)
        same = trained_on == loaded_on
        limit = OTHER_SCHEME if not same else TOLERANCE if loaded_on == FULL_PRECISION else SAME_SCHEME
        if difference <= limit:
            if not same:
                warnings.warn(_OTHER.format(adapter_name, trained_on, loaded_on, difference), stacklevel=4)
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


_OTHER = (
    "Axis {!r} was trained on this base in another precision: {} there, {} here; the sampled weights differ by {:.1%}. "
    "Its tangent is exact at the base it was trained on and close to that here. Evaluate the mix on this base, or load "
    "the base as it was in training."
)


def _decode(text: str) -> tuple[str, np.ndarray]:
    """The scheme, and the sampled weights."""
    kind, _, sample = text.rpartition(":")
    return kind or FULL_PRECISION, np.frombuffer(base64.b64decode(sample), dtype=np.float16).astype(np.float64)
