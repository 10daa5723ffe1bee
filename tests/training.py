"""What the tests of training share: one loss with its gradients, the tangents of a run, how a gradient is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tangent_peft import TangentDPOTrainer


# By name: the axis's `gradient`, and the options of a run that go with it.
GRADIENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "recorded": ("recorded", {"gradient_checkpointing": False}),
    "replay": ("replay", {"gradient_checkpointing": False}),
    "checkpoint": (
        "auto",
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "reentrant": ("auto", {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
}


def loss_and_gradients(trainer: TangentDPOTrainer, compute: Callable[..., Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the first batch by `compute(model, batch)`, and the gradient of every parameter that has one."""
    model = trainer.model.train()
    model.zero_grad()
    loss = compute(model, first_batch_of(trainer))
    loss.backward()
    return loss, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def first_batch_of(trainer: TangentDPOTrainer) -> dict[str, Any]:
    """The same batch at every call."""
    torch.manual_seed(0)
    return next(iter(trainer.get_train_dataloader()))


def tangents(trainer: TangentDPOTrainer) -> dict[str, Tensor]:
    """Copies of the parameters that train."""
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def logged(trainer: TangentDPOTrainer, name: str) -> dict[int, float]:
    """The values of a metric by step."""
    return {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
