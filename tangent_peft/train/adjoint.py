"""The adjoint identity ⟨g, J·τ⟩ = ⟨τ, Jᵀg⟩, checked on a training step as it runs.

g = ∂L/∂f_lin. The left side is known to the fused head, which sees the tangent logits J·τ of the forward pass: it is
the gradient of a scalar 1 that scales them, the `probe`. The right side is Σ ⟨τ, ∂L/∂τ⟩ over the parameters in which
f_lin is linear: ΔW, or B of B·A. A tangent lost in the forward pass, or a gradient lost in the backward pass, makes
them differ by as much as it contributes, provided that the two passes are different code. A recorded gradient is the
transpose of the very pass that ran, lost tangents included; so every other check replays the step.
"""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from tangent_peft.forward import leaf_that_gets_gradients


# Relative to Σ_l |⟨τ_l, ∂L/∂τ_l⟩| over the wrapped layers l; transformers computes norms in float32 in any model.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.05}


class AdjointCheck:
    """Listens to one backward pass: `with AdjointCheck(model, axis) as check: ...`, passing `check.probe` to the head.

    Args:
        model: the unwrapped `PeftModel`.
        axis: the axis that trains.
        dtype: the coarsest precision that takes part in the step.
    """

    def __init__(self, model: PeftModel, axis: str, dtype: torch.dtype) -> None:
        named = model.named_parameters()
        linear = [p for name, p in named if f".{axis}." in name and p.requires_grad and ".tangent_A." not in name]
        self.linear = list(map(leaf_that_gets_gradients(model), linear))
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
        def listen(gradient: Tensor | None) -> None:
            if gradient is not None:  # nothing reached this layer, such as an expert that no token chose
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
        tolerance = TOLERANCE.get(self.dtype, TOLERANCE[torch.bfloat16])
        if error <= tolerance:
            return
        left, right = self.sides()
        raise RuntimeError(
            f"The adjoint identity does not hold at step {step} of axis {axis!r}: ⟨∂L/∂f_lin, Jτ⟩ = {left:.6g} but "
            f"⟨τ, ∂L/∂τ⟩ = {right:.6g}, a relative error of {error:.2g} (limit {tolerance:g} in {self.dtype}). "
            "In the wrapped blocks a tangent or its gradient is lost: look for an operation whose forward derivative "
            "disagrees with its backward (an autograd Function, a custom kernel), a hook that replaces activations, a "
            "module called twice with different results. "
            "`TangentDPOConfig(adjoint_check_steps=0)` switches this check off."
        )
