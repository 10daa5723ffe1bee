"""Bytes of activations: what a wrapped block keeps until its backward pass, and what passes hold for a moment.

Counted per position of the batch, with D the width of the hidden state, F of the MLP's middle, Q = H·E of the queries,
K of the keys, r of all ranks together; the tests count the same on real blocks, tensor by tensor. `open` is the count
while the dual level is open, through which the head runs: a tensor that autograd keeps then keeps its tangent as well.

| a gated block keeps | recorded, dense | recorded, low rank | replay |
|---|---|---|---|
| to the backward pass | 5F + 2D + 4D* + 2Q + 2K | 4F + 4D* + 2Q + 2K + r | D |
| while the level is open | 7F + 4D + 6D* + 3Q + 3K | 5F + 6D* + 3Q + 3K + r | 2D |

D* is of the two norms, which compute in float32 whatever the rest does. In a replay, the block that is replayed keeps
what an ordinary one keeps, 3F + 2Q + 2K and the norms' input, and what its wrapped layers read if τ is dense.
"""

from __future__ import annotations

from tangent_peft.forward.attention_rule import CHUNK
from tangent_peft.forward.head import TILE_ACCELERATOR, TILE_CPU
from tangent_peft.train.sizes import BlockSize, ModelSize, Workload


# Tensors of width F by whether the MLP is gated: dense (kept, open) and low rank (kept, open); of an ordinary block.
# A plain MLP is counted with GELU by tanh, written out as GPT-2 has it; one with a fused activation keeps less.
MIDDLE = {True: ((5, 7), (4, 5)), False: ((6, 10), (5, 8))}
ORDINARY = {True: 3, False: 4}
TILES = 6  # of logits that the head holds at once: three of this tile, three of the last one
CHUNKS = 5  # of attention weights and scores that the tangent's rule holds at once, in float32


def kept(model: ModelSize, block: BlockSize, work: Workload, is_open: bool) -> float:
    """Bytes that a wrapped block keeps, while the level is open or until its backward pass."""
    if work.gradient == "replay":
        return work.tokens * work.element * model.hidden * (2 if is_open else 1)
    queries, keys = model.heads * model.head_size, model.kv_heads * model.head_size
    dense = work.rank is None
    middle = MIDDLE[block.gated][0 if dense else 1][is_open]
    read = (2 if is_open else 1) * block.norms * model.hidden if dense else _ranks(block, work)
    plain = middle * block.inner + read + (3 if is_open else 2) * (queries + keys)
    normed = (3 if is_open else 2) * block.norms * (model.hidden + 1)
    if block.head_norms:  # what is normalized is kept as it was only where the norm casts it
        copies = 3 if is_open and work.element < 4 else 2
        normed += copies * (queries + keys + model.heads + model.kv_heads)
    return work.tokens * (work.element * plain + 4 * normed)


def _ranks(block: BlockSize, work: Workload) -> int:
    return (work.rank or 0) * sum(layer.active for layer in block.wrapped)


def backward_of_block(model: ModelSize, block: BlockSize, work: Workload) -> float:
    """Bytes that one block's backward pass holds beside what was kept: three cotangents of the MLP, and its replay."""
    passing = 3 * block.inner + 2 * model.hidden
    held = float(work.tokens * work.element * passing)
    if work.gradient == "replay":
        held += _ordinary(model, block, work)
    return max(held, attention_workspace(model, work)) + _spelled(block)


def _spelled(block: BlockSize) -> float:
    """ΔW of the block's fused experts and its gradient, in full and in float32 also where τ has a low rank."""
    return 8.0 * sum(layer.weights for layer in block.wrapped if layer.experts > 1)


def _ordinary(model: ModelSize, block: BlockSize, work: Workload) -> float:
    """What an ordinary forward of the block saves, its weights frozen, and what its wrapped layers read."""
    width = model.heads * model.head_size + model.kv_heads * model.head_size
    middle = ORDINARY[block.gated] + (1 if work.rank is None else 0)
    plain = middle * block.inner + 2 * width
    plain += block.norms * model.hidden if work.rank is None else _ranks(block, work)
    normed = block.norms * model.hidden + (width if block.head_norms else 0)
    return work.tokens * (work.element * plain + 4 * normed)


def attention_workspace(model: ModelSize, work: Workload) -> float:
    """Bytes of one chunk of queries in the tangent's rule, against all keys."""
    return CHUNKS * 4.0 * work.rows * model.heads * min(CHUNK, work.length) * work.length


def head_workspace(model: ModelSize, work: Workload, accelerator: bool) -> float:
    """Bytes of the head's tiles of logits in float32, of the hidden states it reads, and of its τ in their dtype."""
    rows, columns = TILE_ACCELERATOR if accelerator else TILE_CPU
    several = work.scored > rows or model.head.outputs > columns
    tile = 4.0 * min(rows, work.scored) * min(columns, model.head.outputs)
    hidden = work.element * model.hidden * (2 * work.scored + 4 * work.tokens)
    cast = work.element * model.head.tangent(work.rank) if work.element < 4 and model.head.wrapped else 0
    narrow = tile / 2 if work.element < 4 else 0  # a product in 16 bits, before it is widened
    return (TILES if several else TILES - 1) * tile + narrow + hidden + cast
