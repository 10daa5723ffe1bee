"""The adjoint identity ⟨g, J·τ⟩ = ⟨τ, Jᵀg⟩, checked on a training step as it runs.

g = ∂L/∂f_lin. The left side is known to the fused head, which sees the tangent logits J·τ of the forward pass: it is
the gradient of a scalar 1 that scales them, the `probe`. The right side is Σ ⟨τ, ∂L/∂τ⟩ over the parameters in which
f_lin is linear: ΔW, or B of B·A. A tangent lost in the forward pass, or a gradient lost in the backward pass, makes
them differ by as much as it contributes.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


# Relative to Σ_l |⟨τ_l, ∂L/∂τ_l⟩| over the wrapped layers l; transformers computes norms in float32 in any model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


class AdjointCheck:
    """Listens to one backward pass: `with AdjointCheck(model, axis) as check: ...`, passing `check.probe` to the head.

    Args:
        model: the unwrapped `PeftModel`.
        axis: the axis that trains.
        dtype: the coarsest precision that takes part in the step.
    """

    def __init__(self, model: PeftModel, axis: str, dtype: torch.dtype) -> None:
        named = model.named_parameters()
        self.linear = [p for name, p in named if f".{axis}." in name and p.requires_grad and ".tangent_A." not in name]
        self.probe = torch.ones((), device=self.linear[0].device, requires_grad=True)
        self.dtype = dtype
        self.products: dict[Tensor, Tensor] = {}  # ⟨τ_l, ∂L/∂τ_l⟩ of the last backward pass
        self.handles: list[Any] = []

    def __enter__(self) -> AdjointCheck:
        for parameter in self.linear:
            self.handles.append(parameter.register_hook(self._listener(parameter)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self.handles:
            handle.remove()

    def _listener(self, parameter: nn.Parameter) -> Any:
        def listen(gradient: Tensor) -> None:
            self.products[parameter] = (gradient * parameter.detach()).sum(dtype=torch.float64)

        return listen

    def sides(self) -> tuple[float, float]:
        """⟨g, J·τ⟩ and ⟨τ, Jᵀg⟩, both times the scale of the loss that was differentiated."""
        left = 0.0 if self.probe.grad is None else float(self.probe.grad)
        return left, float(sum(self.products.values(), start=torch.zeros(())))

    def error(self) -> float | None:
        """Their relative difference; `None` at τ = 0 and where the loss overflowed, which say nothing."""
        left, right = self.sides()
        size = float(sum((product.abs() for product in self.products.values()), start=torch.zeros(())))
        error = abs(left - right) / size if size > 0 else math.nan
        return error if math.isfinite(error) else None

    def require(self, error: float, step: int, axis: str) -> None:
        """Raises if the identity is violated.

        Raises:
            RuntimeError: naming both sides and where to look.
        """
        tolerance = TOLERANCE[self.dtype]
        if error <= tolerance:
            return
        left, right = self.sides()
        raise RuntimeError(
            f"The adjoint identity does not hold at step {step} of axis {axis!r}: ⟨∂L/∂f_lin, Jτ⟩ = {left:.6g} but "
            f"⟨τ, ∂L/∂τ⟩ = {right:.6g}, a relative error of {error:.2g} (limit {tolerance:g} in {self.dtype}). "
            "In the wrapped blocks a tangent or its gradient is lost: look for `.detach()`, an autograd Function, "
            "a hook that replaces activations, or randomness. Compare `TangentConfig(gradient='recorded')` with "
            "'replay': if only one of them fails, it is the forward derivative or the replay. "
            "`TangentDPOConfig(adjoint_check_steps=0)` switches this check off."
        )
