"""TS-DPO as functorch makes it: the baseline of the paper and of tangent_task_arithmetic.

`torch.func.jvp` over all parameters with p − p₀ as the direction, both copies kept; attention without a fused kernel,
which has no derivative; full (B, T, V) logits; a forward of its own for the reference.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jvp


class FunctorchStep:
    """One training step: DPO's sigmoid loss on f(x; θ₀) + J·(θ − θ₀), AdamW on θ.

    Args:
        model: the base in eager attention.
        batch: `input_ids`, `attention_mask`, `completion_mask`, each (2·pairs, T), chosen rows first.
        beta: DPO's β.
        autocast: run the forwards under bfloat16 autocast.
    """

    def __init__(self, model: nn.Module, batch: dict[str, Tensor], beta: float = 0.1, autocast: bool = False) -> None:
        self.model, self.batch, self.beta, self.autocast = model.requires_grad_(False), batch, beta, autocast
        self.start = {name: p.detach() for name, p in model.named_parameters()}
        self.trained = {name: nn.Parameter(p.clone()) for name, p in self.start.items()}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=1e-6)

    def __call__(self) -> float:
        """Forward, reference, backward, update; returns the loss."""
        direction = {name: p - self.start[name] for name, p in self.trained.items()}
        with torch.autocast(self.batch["input_ids"].device.type, torch.bfloat16, enabled=self.autocast):
            primal, tangent = jvp(self._logits, (self.start,), (direction,))
            policy = self._log_probs(primal + tangent)
            with torch.no_grad():
                reference = self._log_probs(self._logits(self.start))
        chosen, rejected = (policy - reference).chunk(2)
        loss = -F.logsigmoid(self.beta * (chosen - rejected)).mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def _logits(self, weights: dict[str, Tensor]) -> Any:
        """Logits (2·pairs, T, V) of the network at `weights`."""
        inputs = {name: self.batch[name] for name in ("input_ids", "attention_mask")}
        return functional_call(self.model, weights, kwargs={**inputs, "use_cache": False}).logits

    def _log_probs(self, logits: Tensor) -> Tensor:
        """Log-probability of each completion, (2·pairs,)."""
        labels = self.batch["input_ids"][:, 1:, None]
        scores = logits[:, :-1].float().log_softmax(-1).gather(-1, labels).squeeze(-1)
        return (scores * self.batch["completion_mask"][:, 1:]).sum(-1)
