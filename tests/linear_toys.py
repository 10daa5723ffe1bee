"""Networks whose linearity gap is known in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from tangent_peft import TangentConfig


TOKENS, WIDTH = 20, 6


class Two(nn.Module):
    """f = W₂ g(W₁ e(x)) over a fixed embedding; without g, f(θ₀ + λτ) is a polynomial of second degree in λ."""

    def __init__(self, bend: Any = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, TOKENS, bias=False)
        self.bend = bend

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """Logits (B, T, V) of the tokens."""
        x = self.first(self.embed(input_ids))
        return Output(logits=self.second(x if self.bend is None else self.bend(x)))


class Output(dict[str, Tensor]):
    """Logits by attribute and by key, as transformers gives them."""

    @property
    def logits(self) -> Tensor:
        """(B, T, V)."""
        return self["logits"]


def toy(targets: list[str], axes: tuple[str, ...] = ("help",), bend: Any = None) -> PeftModel:
    """A toy in float64 with random dense axes on these layers."""
    options: dict[str, Any] = {"target_modules": targets, "num_layers": None, "lm_head": False, "init_weights": False}
    model = get_peft_model(Two(bend), TangentConfig(**options), adapter_name=axes[0])
    for axis in axes[1:]:
        model.add_adapter(axis, TangentConfig(**options))
    return model.double().eval()


def ids() -> dict[str, Tensor]:
    """A batch (4, 5)."""
    return {"input_ids": torch.randint(0, TOKENS, (4, 5), generator=torch.Generator().manual_seed(1))}


def parts(model: PeftModel, axis: str) -> SimpleNamespace:
    """Embedded tokens x, W₁, W₂ and ΔW₁, ΔW₂ of a toy, written out."""
    base = model.get_base_model()
    first, second = base.first, base.second
    return SimpleNamespace(
        x=base.embed(ids()["input_ids"]),
        w1=first.get_base_layer().weight,
        w2=second.get_base_layer().weight,
        d1=first.get_delta_weight(axis),
        d2=second.get_delta_weight(axis),
    )


@torch.no_grad()
def curvature(model: PeftModel, axis: str = "help") -> float:
    """c of gap(λ) = c |λ|: (W₂ + λD₂)(W₁ + λD₁)x = f₀ + λ(D₂W₁ + W₂D₁)x + λ² D₂D₁x."""
    p = parts(model, axis)
    first_order = p.x @ (p.d2 @ p.w1 + p.w2 @ p.d1).T
    return float((p.x @ (p.d2 @ p.d1).T).norm() / first_order.norm())
