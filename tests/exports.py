"""Models with two axes and what their exports are compared with, for the tests of every export."""

from __future__ import annotations

from typing import Any

from cases import config, logits, tangent_model
from conftest import batch
from peft import PeftModel
from torch import Tensor


INPUTS = batch("left")
WEIGHTS = {"help": 0.7, "verb": -1.3}


def two_axes(name: str = "llama", first: str = "shared", second: str = "shared", **options: Any) -> PeftModel:
    """The tiny model `name` with the axes help and verb, of one form each."""
    model = tangent_model(name, first, axis="help", **options)
    model.add_adapter("verb", config(second, **options))
    return model


def at_weights(model: PeftModel, weights: dict[str, float]) -> Tensor:
    """Logits of the ordinary network at θ(λ)."""
    with model.axes(weights), model.linearized(False):
        return logits(model, **INPUTS)
