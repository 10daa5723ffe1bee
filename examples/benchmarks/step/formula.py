"""How many floating-point operations a step ought to take, written down from the mathematics alone.

Counted are matrix products, two operations per multiply-add. With F one forward of the pair batch and κ the share of F
in the blocks that train, DESIGN's short forms are: DPO on the same layers 2 + 2κ, on all 4, LoRA 2 + κ; recorded 1 + 4κ
dense, 1 + 2κ low rank; replay 1 + 5κ and 1 + 3κ; functorch 6. What they leave out, and this file has:

* the input of the first block that trains needs no gradient and carries no tangent: one product less in each of
  q, k, v there (`entry`);
* attention: a fused kernel computes 2 products of size T² forward and 5 backward. The tangent's rule takes 5 and 5
  (two of them the weights anew), but over chunks of queries it visits only a `chunked` share of the T² pairs;
* TRL's head takes its products for every position where Triton does not run, ours for completions only. Both compute
  the logits once more in the backward pass;
* stock gradient checkpointing makes the embedding's output require a gradient, so that the backward pass descends
  through the frozen blocks as well and recomputes all of them (each but for its last product, which nobody needs);
* a rank r is small against the width but not nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from step.setting import Sizes


CHUNK = 128  # queries per chunk of the tangent's attention
ENTRY = ("q_proj", "k_proj", "v_proj")  # the layers that read a block's input
LAST = "down_proj"  # the layer that ends it


@dataclass(frozen=True)
class Products:
    """Operations of the products that steps are made of.

    Attributes:
        linear: the linear layers of one block.
        entry: those of them that read the block's input.
        last: the one that comes last, `down_proj`.
        attention: one product of size T² (QKᵀ or PV) of one block.
        chunked: the same as the tangent's rule runs it.
        low_in: x ↦ A x in all linear layers of one block.
        low_out: A x ↦ B A x likewise.
        low_entry: x ↦ A x in the layers that read the block's input.
        head: hidden state ↦ logits where TRL's head does it.
        head_all: the same at every position.
        head_ours: the same on completions.
        head_low: h ↦ B A h on completions.
    """

    linear: float
    entry: float
    last: float
    attention: float
    chunked: float
    low_in: float
    low_out: float
    low_entry: float
    head: float
    head_all: float
    head_ours: float
    head_low: float


def products(s: Sizes) -> Products:
    """The sizes turned into operations."""
    per_position = 2 * s.rows * s.tokens
    entry = [sizes for name, sizes in s.linears.items() if name.endswith(ENTRY)]
    low = per_position * s.rank
    attention = 2 * s.rows * s.heads * s.tokens**2 * s.head_size
    stops = [min(start + CHUNK, s.tokens) for start in range(0, s.tokens, CHUNK)]
    visited = sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))
    head = 2 * s.hidden * s.vocabulary
    scored = s.completions if s.compact else s.rows * (s.tokens - 1)
    return Products(
        linear=per_position * sum(i * o for i, o in s.linears.values()),
        entry=per_position * sum(i * o for i, o in entry),
        last=per_position * sum(i * o for name, (i, o) in s.linears.items() if name.endswith(LAST)),
        attention=attention,
        chunked=attention * visited / s.tokens**2,
        low_in=low * sum(i for i, _ in s.linears.values()),
        low_out=low * sum(o for _, o in s.linears.values()),
        low_entry=low * sum(i for i, _ in entry),
        head=head * scored,
        head_all=head * s.rows * s.tokens,
        head_ours=head * s.completions,
        head_low=2 * s.completions * s.rank * (s.hidden + s.vocabulary),
    )


def predict(s: Sizes) -> dict[str, float]:
    """Operations of one step by scheme."""
    p = products(s)
    blocks, k = s.blocks, s.wrapped
    block = p.linear + 2 * p.attention
    forward = blocks * block
    # Gradients of inputs alone, as a frozen layer passes them on, and of inputs and weights.
    back_frozen = k * (p.linear + 5 * p.attention) - p.entry
    back_full = k * (2 * p.linear + 5 * p.attention) - p.entry
    low = p.low_in + p.low_out
    # The tangent's forward, W ẋ + τ x and attention's rule, and its transpose.
    carry = k * (p.linear + 5 * p.chunked) - p.entry
    dense, low_rank = carry + k * p.linear, carry + k * low
    # Heads. Forward: W h, W ḣ, τ h; backward: W (h + ḣ) and τ h anew, then the gradients of ḣ and τ.
    head_dense = 7 * p.head_ours
    head_low = 4 * p.head_ours + 3 * p.head_low
    again = k * block  # what replay computes a second time
    dpo = 2 * forward + back_full + 5 * p.head
    below = (blocks - k) * (p.linear + 5 * p.attention) + p.entry  # the backward pass that stock checkpointing adds
    return {
        "dpo_same_layers": dpo,
        "dpo_checkpointed": dpo + below + s.blocks * (block - p.last),
        "dpo_all": 2 * forward + blocks * (2 * p.linear + 5 * p.attention) + 5 * p.head,
        "lora": 2 * forward + back_frozen + 3 * k * low - p.low_entry + 4 * p.head,
        "functorch": blocks * (6 * p.linear + 12 * p.attention) + 6 * p.head_all,
        "dense_recorded": forward + 2 * dense + head_dense,
        "dense_replay": forward + dense + again + back_full + head_dense,
        "low_rank_recorded": forward + 2 * low_rank - k * p.low_in + head_low,
        "low_rank_cached": forward - (blocks - k) * block + 2 * low_rank - k * p.low_in + head_low,
        "low_rank_replay": forward + low_rank + again + back_frozen + k * low + head_low,
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
    found, p = predict(s), products(s)
    form = variant.removesuffix("_checkpointed")  # of a tangent's variant; its replay is gradient checkpointing
    names = [name for name in (variant, form, f"{form}_recorded", f"{form}_replay") if name in found]
    name = names[0] if names[0] == variant else min(names, key=lambda n: abs(math.log(found[n] / counted)))
    forward = s.blocks * (p.linear + 2 * p.attention) + p.head_all
    return {
        "scheme": name,
        "predicted_over_counted": round(found[name] / counted, 4),
        "counted_gflop": round(counted / 1e9, 3),
        "counted_forwards": round(counted / forward, 3),
    }
