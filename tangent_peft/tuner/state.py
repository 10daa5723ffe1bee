"""Checks a saved axis against the model before its weights are copied: nothing missing, nothing of another shape."""

from __future__ import annotations

from torch import Tensor, nn

from tangent_peft.tuner.registration import PREFIX


def check_state_dict(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compares a checkpoint, with its keys already mapped to the model's, with the adapter's parameters.

    Raises:
        ValueError: naming the first parameter that is missing or has another shape.
    """
    expected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if f".{PREFIX}" in name and name.split(".")[-2] == adapter_name
    }
    missing = sorted(set(expected) - set(state_dict))
    if missing:
        raise ValueError(
            f"The file of axis {adapter_name!r} lacks {len(missing)} of {len(expected)} tangents, for example "
            f"{missing[0]!r}. It belongs to a model with other layers, or was written with another TangentConfig; load "
            "it with the adapter_config.json saved beside it, on the base model named there."
        )
    for name, parameter in expected.items():
        if state_dict[name].shape != parameter.shape:
            raise ValueError(
                f"The tangent {name!r} of axis {adapter_name!r} has shape {tuple(state_dict[name].shape)} in the file "
                f"and {tuple(parameter.shape)} in this model. The axis was trained on another base model or with "
                "another rank; load it on the base model named in its adapter_config.json."
            )
