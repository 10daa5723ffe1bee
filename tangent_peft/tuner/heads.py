"""The head of a wrapped model as tensors: weight, tangents of its axes, and what the model does to its logits.

Seam: the names by which configurations call the factor and the soft-cap of the logits. Knows no trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from tangent_peft.forward.head import Head
from tangent_peft.tuner.backends import read_weight
from tangent_peft.tuner.layer import TangentLayer


def head_of(model: PreTrainedModel, head: Any, carried: Mapping[str, float]) -> Head:
    """The head's weight, its tangent Σ λᵢ τᵢ, and what the model does to its logits.

    Args:
        model: the model itself, without PEFT around it.
        head: its output layer, wrapped or not.
        carried: λ by axis; those of which the head carries no tangent are passed over.
    """
    scale, softcap = logit_options(model.config.get_text_config().to_dict())
    if not isinstance(head, TangentLayer):
        return Head(read_weight(head), head.bias, scale=scale, softcap=softcap)
    linear: Any = head.get_base_layer()
    factors = [head.factors(name, weight) for name, weight in carried.items() if name in head.tangent_r]
    dense = [f.dense for f in factors if f.dense is not None]
    bs, projections = [f.b for f in factors if f.b is not None], [f.a for f in factors if f.a is not None]
    return Head(
        read_weight(linear),
        linear.bias,
        dense=sum(dense[1:], start=dense[0]) if dense else None,
        b=(bs[0] if len(bs) == 1 else torch.cat(bs, dim=1)) if bs else None,
        a=(projections[0] if len(projections) == 1 else torch.cat(projections)) if projections else None,
        scale=scale,
        softcap=softcap,
    )


def logit_options(config: dict[str, Any]) -> tuple[float, float | None]:
    """Factor and soft-cap of the logits; the names are those TRL's `add_fused_lm_head` reads, in its order."""
    factor = next((config[n] for n in _LOGIT_FACTORS if config.get(n) is not None), None)
    if factor is None and config.get("logits_scaling") is not None:
        scaling = config["logits_scaling"]
        factor = scaling if config.get("model_type") == "hyperclovax" else 1 / scaling
    return 1.0 if factor is None else float(factor), config.get("final_logit_softcapping")


_LOGIT_FACTORS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
