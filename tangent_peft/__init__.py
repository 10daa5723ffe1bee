"""Steerable alignment for the Hugging Face stack: preference axes as directions in a frozen model's tangent space.

Each axis (help, verbosity, safety, …) is trained once by TS-DPO (arXiv 2602.01128); afterwards axes are mixed by
number, θ(λ) = θ₀ + Σ λᵢ τᵢ, with no retraining. Importing this package registers the PEFT method:

    import tangent_peft
    model = get_peft_model(base, TangentConfig(task_type="CAUSAL_LM"), adapter_name="help")
    model.combine_axes({"help": 1.0, "verb": -0.5})

Floors of the house: cli > compare > diagnose > train, evaluate > tuner > forward. A floor imports its own package or
those below; training and evaluation do not know each other, nor does diagnosis know training.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tangent_peft.tuner import LoraExport as LoraExport
from tangent_peft.tuner import MergedExport as MergedExport
from tangent_peft.tuner import TangentConfig as TangentConfig
from tangent_peft.tuner import TangentModel as TangentModel


if TYPE_CHECKING:
    from tangent_peft.train import TangentDPOConfig as TangentDPOConfig
    from tangent_peft.train import TangentDPOTrainer as TangentDPOTrainer


__version__ = "0.1.0"

__all__ = ["LoraExport", "MergedExport", "TangentConfig", "TangentDPOConfig", "TangentDPOTrainer", "TangentModel"]

_LAZY = {"TangentDPOConfig": "tangent_peft.train", "TangentDPOTrainer": "tangent_peft.train"}


def __getattr__(name: str) -> Any:
    """Loads the training floor, and with it TRL, only when it is asked for."""
    if name in _LAZY:
        return vars(import_module(_LAZY[name]))[name]
    if name in ("train", "evaluate", "diagnose", "compare"):
        return import_module(f"tangent_peft.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
