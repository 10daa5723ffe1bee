"""Tiny models for the tests of steering: a tuned model that adds a fixed vector to the residual stream of one block."""

from __future__ import annotations

import copy
from typing import Any

import torch
from conftest import VOCABULARY, enlarge, make_llama
from torch import Tensor

from tangent_peft.diagnose.prompts import TokenBatch
from tangent_peft.diagnose.steering.vectors import SteeringVectors


D, L = 32, 3


def biased_llama(**options: Any) -> Any:
    """A tiny Llama in float64 whose blocks end in a bias, which is 0."""
    torch.manual_seed(0)
    model = enlarge(make_llama(mlp_bias=True, **options)).double()
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.bias.zero_()
    return model


def with_bias(model: Any, layer: int, vector: Tensor) -> Any:
    """A copy that adds `vector` to what leaves block `layer` − 1."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved.model.layers[layer - 1].mlp.down_proj.bias += vector
    return moved


def direction(seed: int = 0, size: float = 3.0) -> Tensor:
    """A vector (D,) in float64."""
    drawn = torch.randn(D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn * (size / drawn.norm())


def vectors_of(model: Any, by_layer: dict[int, Tensor]) -> SteeringVectors:
    """Steering vectors made by hand."""
    name = type(model).__name__
    return SteeringVectors(dict(by_layer), "tiny", name, L, "base", "tuned", "last prompt token", 8, {"seed": 0})


def token_rows(count: int, length: int = 6, seed: int = 3) -> TokenBatch:
    """Rows of random tokens, the last one kept."""
    ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))
    keep = torch.zeros_like(ids, dtype=torch.bool)
    keep[:, -1] = True
    return TokenBatch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, keep)
