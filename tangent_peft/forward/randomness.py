"""A linearized training forward draws no random numbers: the primal is the reference, and a replay must repeat it."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state(device: str) -> Tensor:
    """State of the random generator that modules on this kind of device draw from."""
    return torch.get_rng_state() if device == "cpu" else torch.get_device_module(device).get_rng_state()


def refuse_randomness(before: Tensor, device: str, name: str) -> None:
    """Raises if random numbers were drawn since `before`.

    Raises:
        ValueError: naming `name` as where it happened.
    """
    if not torch.equal(before, random_state(device)):
        raise ValueError(
            f"{name} drew random numbers in a linearized training forward: dropout (or router noise) is active, so "
            "policy and reference would be those of a randomly thinned network. Set the dropout probabilities of the "
            "model's config to 0 (and `disable_dropout=True` in the training arguments), or call `model.eval()`."
        )
