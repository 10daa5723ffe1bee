"""The axes' configurations by name, and the check of a saved axis before its weights are copied into the model."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from tangent_peft.forward import full_shape
from tangent_peft.tuner.config import TangentConfig
from tangent_peft.tuner.registration import PREFIX


class AxisConfigs(dict[str, TangentConfig]):
    """Configurations by axis name; final.

    `PeftModel` looks up the one active name that it remembers on every call, and does not learn that this axis was
    deleted while several others, or none, are active. Such a name still finds a configuration: that of an axis left.
    """

    def __init__(self, configs: dict[str, TangentConfig]) -> None:
        super().__init__(configs)
        self.deleted: set[str] = set()

    def __setitem__(self, name: str, config: TangentConfig) -> None:
        """Keeps it; an axis made from the very configuration of another one has not that one's safe range."""
        if config.safe_range is not None and any(config is other for key, other in self.items() if key != name):
            config = copy.copy(config)
            config.safe_range = None
        super().__setitem__(name, config)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.deleted.add(name)

    def __missing__(self, name: str) -> TangentConfig:
        if name in self.deleted and self:
            return next(iter(self.values()))
        raise KeyError(name)


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
        if state_dict[name].shape != full_shape(parameter):
            raise ValueError(
                f"The tangent {name!r} of axis {adapter_name!r} has shape {tuple(state_dict[name].shape)} in the file "
                f"and {tuple(full_shape(parameter))} in this model. The axis was trained on another base model or with "
                "another rank; load it on the base model named in its adapter_config.json."
            )
