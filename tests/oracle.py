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
from torch.overrides import TorchFunctionMode


CAPS = ("final_logit_softcapping", "output_logit_soft_cap")  # names of the cap that ends some models
NO_CAP = 1e12
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


class InFloat64(TorchFunctionMode):
    """Every float32 that a model's code asks for is float64: norms, softmaxes, routers, rotary angles, states."""

    def __enter__(self) -> Any:
        """Makes float64 the default as well."""
        torch.set_default_dtype(torch.float64)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Makes float32 the default again."""
        torch.set_default_dtype(torch.float32)
        super().__exit__(*error)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls `func` with another float32."""
        if func is Tensor.float:
            func = Tensor.double
        kwargs = {name: _wide(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **kwargs)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def float64_twin(model: nn.Module, attention: str = "eager") -> nn.Module:
    """The same network and weights in float64 with plain operations: built anew, its logits not yet soft-capped."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = attention
    config._experts_implementation = "eager"
    vars(config).update({name: NO_CAP for name in CAPS if vars(config).get(name)})
    twin = type(model)(config)
    twin.load_state_dict(model.state_dict())
    for module in twin.modules():
        if type(module).__name__ == "BloomGelu":  # a Function that torch.func does not take
            module.forward = lambda x: torch.nn.functional.gelu(x, approximate="tanh")
    return twin.double().eval()


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """What a model does to its logits last; the linearized ones end before."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
