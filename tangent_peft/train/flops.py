"""How many floating-point operations a step takes, written down from the mathematics alone.

Counted are matrix products, two operations per multiply-add. With F one forward of the pair batch and κ the share of F
in the blocks that train, the short forms are: recorded 1 + 4κ dense, 1 + 2κ low rank; replay 1 + 5κ and 1 + 3κ. What
they leave out, and this file has:

* the input of the first block that trains carries no tangent: one product less in each of the layers that read it
  (`entry`);
* attention: a fused kernel computes 2 products of size T² forward and 5 backward. The tangent's rule takes 5 and 5
  (two of them the weights anew), but over chunks of queries it visits only a `chunked` share of the T² pairs. Windows
  of attention are not known here: each layer is taken to see all keys;
* the head runs on completions only, and computes its logits once more in the backward pass;
* of a mixture of experts, those that serve a token. A low-rank tangent of fused experts is multiplied out, B·A in full,
  and then costs what a dense one does;
* a rank r is small against the width but not nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tangent_peft.forward.attention_rule import CHUNK
from tangent_peft.train.sizes import BlockSize, LinearSize, ModelSize, Workload


ENTRY = (
    "q_proj",
    "k_proj",
    "v_proj",
    "qkv_proj",
    "c_attn",
    "query_key_value",
    "q_a_proj",
    "kv_a_proj_with_mqa",
    "Wqkv",
)


@dataclass(frozen=True)
class Products:
    """Operations of the products that steps are made of, summed over the blocks that train where nothing else is said.

    Attributes:
        linear: the linear layers, experts that serve a token among them.
        linear_all: the same in all blocks.
        wrapped: those of `linear` that carry a tangent.
        spelled: those of `wrapped` whose low-rank tangent is multiplied out, and that product: fused experts.
        entry: those in the first of the blocks that read its input.
        attention: one product of size T² (QKᵀ or PV).
        attention_all: the same in all blocks.
        chunked: the same as the tangent's rule runs it.
        low_in: x ↦ A x in all wrapped layers.
        low_out: A x ↦ B A x likewise.
        low_entry: x ↦ A x in the layers of `entry`.
        head: hidden state ↦ logits on completions.
        head_all: the same at every position.
        head_low: h ↦ B A h on completions.
    """

    linear: float
    linear_all: float
    wrapped: float
    spelled: float
    entry: float
    attention: float
    attention_all: float
    chunked: float
    low_in: float
    low_out: float
    low_entry: float
    head: float
    head_all: float
    head_low: float

    @property
    def forward(self) -> float:
        """F with the head at every position."""
        return self.linear_all + 2 * self.attention_all + self.head_all


def products(model: ModelSize, work: Workload) -> Products:
    """The sizes turned into operations."""
    trained, length = model.trained_blocks, work.length
    entry = [x for x in trained[0].layers if x.name.endswith(ENTRY)] if trained else []
    wrapped = [layer for block in trained for layer in block.wrapped]
    fused, plain = [x for x in wrapped if x.experts > 1], [x for x in wrapped if x.experts == 1]
    attention = 2 * work.rows * model.heads * length**2 * model.head_size
    stops = [min(start + CHUNK, length) for start in range(0, length, CHUNK)]
    visited = sum((stop - start) * stop for start, stop in zip([0, *stops], stops, strict=False))
    head, low = 2 * model.head.weights, 2 * work.tokens * (work.rank or 0)
    return Products(
        linear=2 * work.tokens * _per_token(trained),
        linear_all=2 * work.tokens * _per_token(model.blocks),
        wrapped=2 * work.tokens * sum(x.products for x in wrapped),
        spelled=sum(2 * work.tokens * x.products + 2 * x.weights * (work.rank or 0) for x in fused),
        entry=2 * work.tokens * sum(x.products for x in entry),
        attention=attention * len(trained),
        attention_all=attention * len(model.blocks),
        chunked=attention * len(trained) * visited / length**2,
        low_in=low * sum(x.inputs for x in plain),
        low_out=low * sum(x.outputs for x in plain),
        low_entry=low * sum(x.active * x.inputs for x in entry if x.wrapped),
        head=head * work.scored,
        head_all=head * work.tokens,
        head_low=2 * work.scored * (work.rank or 0) * (model.head.inputs + model.head.outputs),
    )


def _per_token(blocks: Iterable[BlockSize]) -> int:
    layers: list[LinearSize] = [layer for block in blocks for layer in block.layers]
    return sum(layer.products for layer in layers)


def step_operations(model: ModelSize, work: Workload) -> float:
    """Operations of forward and backward of one TS-DPO step on one process's batch.

    Heads: forward W h, W ḣ, τ h and four expectations; backward W (h + ḣ) and τ h anew, then the gradients of ḣ and τ.
    """
    p, low_rank = products(model, work), work.rank is not None
    own = p.low_in + p.low_out if low_rank else p.wrapped
    carry = (
        p.linear + 5 * p.chunked - p.entry
    )  # the tangent's forward: W ẋ and attention's rule; its transpose costs as much
    head = 4 * p.head + ((3 * p.head_low if low_rank else 3 * p.head) if model.head.wrapped else 0)
    head += 4 * 2 * work.scored * model.head.outputs  # Σ e^{2z}, Σ e^z z, Σ e^z z₀, Σ e^{2 z₀}, as products of rows
    forward = p.linear_all + 2 * p.attention_all
    if work.gradient == "recorded":
        return forward + 2 * (carry + own) - (p.low_in if low_rank else 0) + head
    again = p.linear + 2 * p.attention
    backward = p.linear + 5 * p.attention - p.entry
    return forward + carry + own + again + backward + own + head
