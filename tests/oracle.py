"""Slow and obviously right: the linearized model as torch.func.jvp and vjp over the *unmodified* network.

Nothing here comes from `tangent_peft`. A tangent is a dict of ΔW by parameter name; the network is a float-exact copy
in eager attention with its head untied, so that a tangent on the head is one on the head alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp


Deltas = Mapping[str, Tensor]  # ΔW by the name of the weight in the unmodified model, in its layout


def untied_copy(model: nn.Module) -> nn.Module:
    """A copy in eager attention whose head has a weight of its own, if it is a language model's."""
    clone = copy.deepcopy(model)
    clone.set_attn_implementation("eager")
    head = clone.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    return clone.eval()


def _function(model: nn.Module, deltas: Deltas, inputs: dict[str, Any]) -> Any:
    frozen = {name: p for name, p in model.named_parameters() if name not in deltas}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**frozen, **weights}, kwargs={**inputs, "use_cache": False}).logits

    return logits


def linearized(model: nn.Module, deltas: Deltas, **inputs: Any) -> tuple[Tensor, Tensor]:
    """f(θ₀) and f(θ₀) + J·τ, both (B, T, V)."""
    clone = untied_copy(model)
    weights = {name: p.detach() for name, p in clone.named_parameters() if name in deltas}
    assert set(weights) == set(deltas), sorted(set(deltas) - set(weights))
    base, tangent = jvp(_function(clone, deltas, inputs), (weights,), ({n: deltas[n] for n in weights},))
    return base, base + tangent


def gradient(model: nn.Module, deltas: Deltas, cotangent: Tensor, **inputs: Any) -> dict[str, Tensor]:
    """Jᵀ·cotangent by weight name: the gradient in ΔW of any loss whose gradient in the logits is `cotangent`."""
    clone = untied_copy(model)
    weights = {name: p.detach() for name, p in clone.named_parameters() if name in deltas}
    _, pull_back = vjp(_function(clone, deltas, inputs), weights)
    return pull_back(cotangent)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax(scale·QKᵀ + bias)·V with repeated key heads; all of (B, H or K, T or S, E)."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return torch.softmax(scale * q @ k.mT + bias, dim=-1) @ v
