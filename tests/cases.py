"""The forms of τ and a tiny model that carries one, for the tests of every room."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import build
from peft import PeftModel, get_peft_model
from torch import Tensor

from tangent_peft import TangentConfig
from tangent_peft.tuner import TangentLayer


FORMS: dict[str, dict[str, Any]] = {
    "dense": {"r": None},
    "shared": {"r": 4},
    "trained": {"r": 4, "projection": "trained"},
}


def config(form: str = "dense", **options: Any) -> TangentConfig:
    """A configuration whose axis starts at a random τ on the last two blocks and the head."""
    defaults = {"task_type": "CAUSAL_LM", "num_layers": 2, "init_weights": False}
    return TangentConfig(**{**defaults, **FORMS[form], **options})


def tangent_model(name: str = "llama", form: str = "dense", axis: str = "default", **options: Any) -> PeftModel:
    """The tiny model `name` with one axis, in eval mode."""
    return get_peft_model(build(name), config(form, **options), adapter_name=axis).eval()


def tangent_layers(model: torch.nn.Module) -> list[TangentLayer]:
    """The wrapped layers, in the model's order."""
    return [module for module in model.modules() if isinstance(module, TangentLayer)]


def deltas(model: PeftModel) -> dict[str, Tensor]:
    """ΔW of the active mix by the weight's name in the unmodified model."""
    return {
        layer.weight_name: sum(layer.get_delta_weight(axis) for axis in layer.carried_axes()).detach()
        for layer in tangent_layers(model)
        if layer.carried_axes()
    }


class _Float64Torch:
    """`torch` with another float32: in it transformers computes its norms and softmaxes, whatever the model's dtype."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def in_float64(model: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The model in float64, its norms and softmaxes included; undone with the test."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    monkeypatch.setattr(sys.modules[type(base).__module__], "torch", _Float64Torch())
    return model.double()


@torch.no_grad()
def logits(model: torch.nn.Module, **inputs: Any) -> Tensor:
    """The logits (B, T, V), without a graph."""
    return model(**inputs).logits
