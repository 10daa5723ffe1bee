"""How many floating-point operations the steps ought to take that a TS-DPO step is compared with.

TS-DPO's own are `tangent_peft.train.flops`, whose products this file uses. With F one forward of the pair batch and κ
the share of F in the blocks that train, the short forms are: DPO on the same layers 2 + 2κ, on all 4, LoRA 2 + κ,
functorch 6. What they leave out beside what is said there:

* TRL's head takes its products for every position where Triton does not run, ours for completions only. Both compute
  the logits once more in the backward pass;
* stock gradient checkpointing makes the embedding's output require a gradient, so that the backward pass descends
  through the frozen blocks as well and recomputes all of them (each but for its last product, which nobody needs).
"""

from __future__ import annotations

import math
from dataclasses import replace

from step.setting import Sizes
from tangent_peft.train.flops import products, step_operations


LAST = "down_proj"  # the layer that ends a block


def predict(s: Sizes) -> dict[str, float]:
    """Operations of one step by scheme."""
    p, model = products(s.model, s.work), s.model
    # Gradients of inputs alone, as a frozen layer passes them on, and of inputs and weights.
    back_frozen = p.linear + 5 * p.attention - p.entry
    back_full = p.linear + p.wrapped + 5 * p.attention - p.entry
    forward = p.linear_all + 2 * p.attention_all
    head = p.head if s.compact else p.head_all * (s.work.length - 1) / s.work.length  # as TRL computes it
    low = p.low_in + p.low_out
    dpo = 2 * forward + back_full + 5 * head
    below = p.linear_all - p.linear + 5 * (p.attention_all - p.attention) + p.entry  # what stock checkpointing adds
    layers = [layer for block in model.blocks for layer in block.layers if layer.name.endswith(LAST)]
    last = 2 * s.work.tokens * sum(layer.products for layer in layers)
    ours = {
        f"{form}_{gradient}": step_operations(model, replace(s.work, rank=rank, gradient=gradient))
        for form, rank in (("dense", None), ("low_rank", s.work.rank))
        for gradient in ("recorded", "replay")
    }
    trunk = p.linear_all - p.linear + 2 * (p.attention_all - p.attention)
    return {
        "dpo_same_layers": dpo,
        "dpo_checkpointed": dpo + below + forward - last,
        "dpo_all": 2 * forward + 2 * p.linear_all + 5 * p.attention_all + 5 * head,
        "lora": 2 * forward + back_frozen + 3 * low - p.low_entry + 4 * head,
        "functorch": 6 * p.linear_all + 12 * p.attention_all + 6 * p.head_all,
        **ours,
        "low_rank_cached": ours["low_rank_recorded"] - trunk,
    }


def predicted_ratio(a: str, b: str, s: Sizes) -> dict[str, float]:
    """Predicted operations of variant A over B, where TRL's head scores every position and where it skips prompts."""

    def operations(variant: str, sizes: Sizes) -> float:
        found, form = predict(sizes), variant.removesuffix("_checkpointed")
        return found.get(variant) or found.get(f"{form}_{'recorded' if form == variant else 'replay'}") or math.nan

    heads = {name: replace(s, compact=compact) for name, compact in (("every_position", False), ("answers", True))}
    return {name: round(operations(a, sizes) / operations(b, sizes), 3) for name, sizes in heads.items()}


def explain(variant: str, counted: float, s: Sizes) -> dict[str, object]:
    """Predicted / counted, and the scheme behind the prediction; for `gradient="auto"` the one that fits better."""
    found = predict(s)
    form = variant.removesuffix("_checkpointed")  # of a tangent's variant; its replay is gradient checkpointing
    names = [name for name in (variant, form, f"{form}_recorded", f"{form}_replay") if name in found]
    name = names[0] if names[0] == variant else min(names, key=lambda n: abs(math.log(found[n] / counted)))
    return {
        "scheme": name,
        "predicted_over_counted": round(found[name] / counted, 4),
        "counted_gflop": round(counted / 1e9, 3),
        "counted_forwards": round(counted / products(s.model, s.work).forward, 3),
    }
