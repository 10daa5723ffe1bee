"""Two axes that visibly change what a tiny model with random weights writes, for the tests of the demo."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from tangent_peft import TangentConfig


STRENGTH = 12.0  # of a randomly initialized B: at less, greedy answers stay as they are


def two_axes(base: PreTrainedModel) -> Any:
    """The base with the axes `help` and `verb` of rank 4, in eval mode."""
    torch.manual_seed(1)
    config = TangentConfig(num_layers=2, r=4, init_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, adapter_name="help")
    model.add_adapter("verb", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "tangent_B" in name:
                parameter.mul_(STRENGTH)
    return model.eval()
