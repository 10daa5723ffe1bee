"""The forms of τ and a tiny model that carries one, for the tests of every room."""

from __future__ import annotations

from typing import Any

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


@torch.no_grad()
def logits(model: torch.nn.Module, **inputs: Any) -> Tensor:
    """The logits (B, T, V), without a graph."""
    return model(**inputs).logits
