"""Log-probabilities of the same held-out pairs, again and again, as a model's weights change.

The frozen part of the model below the first trained block is run once for all mixes. Knows no method.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.compare.settings import Settings
from tangent_peft.compare.training import Row, read_pairs
from tangent_peft.evaluate.pairs import pair_batch
from tangent_peft.forward import evaluating, find_head
from tangent_peft.forward.head import Head
from tangent_peft.forward.trunk import Trunk
from tangent_peft.tuner import TangentLayer
from tangent_peft.tuner.axes import tangent_layers, tangent_tuner
from tangent_peft.tuner.heads import head_of
from tangent_peft.tuner.targets import find_blocks


Mix = Mapping[str, float]
TILE = 256  # answer tokens whose logits over the vocabulary are held at once


# ---- what is scored --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """Held-out pairs of all axes, those that axes share only once.

    Attributes:
        pairs: the distinct pairs, in one of their two orders.
        index: for each axis the position of each of its pairs in `pairs`.
        sign: for each axis 1 where its chosen answer is that of `pairs`, −1 where it is the other one.
    """

    pairs: list[Row]
    index: dict[str, list[int]]
    sign: dict[str, list[int]]


def pair_key(row: Row) -> str:
    """What two rows have in common that are one pair, in either order of the answers."""
    prompt, *answers = (json.dumps(row[name]) for name in ("prompt", "chosen", "rejected"))
    return json.dumps([prompt, *sorted(answers)])


def held_out(settings: Settings) -> HeldOut:
    """The first `heldout` test pairs of each axis."""
    found: dict[str, int] = {}
    pairs: list[Row] = []
    index: dict[str, list[int]] = {}
    sign: dict[str, list[int]] = {}
    for axis in settings.axes:
        index[axis], sign[axis] = [], []
        for row in read_pairs(settings.test_set(axis))[: settings.heldout]:
            key = pair_key(row)
            if key not in found:
                found[key] = len(pairs)
                pairs.append(row)
            index[axis].append(found[key])
            sign[axis].append(1 if row["chosen"] == pairs[found[key]]["chosen"] else -1)
    return HeldOut(pairs, index, sign)


# ---- batches ---------------------------------------------------------------------------------------------------------


class PairScorer:
    """Scores the same pairs again and again, under whatever the model's weights and axes are at the time.

    Args:
        model: a causal language model; with tangent axes, of which one is active, its trunk is run only once.
        tokenizer: its tokenizer.
        pairs: N pairs.
        batch_size: pairs per forward; pairs of like length are taken together.
    """

    def __init__(self, model: Any, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Row], batch_size: int) -> None:
        self.model, self.size = model, len(pairs)
        device = next(model.parameters()).device
        lengths = [pair_batch(tokenizer, [pair])["input_ids"].shape[1] for pair in pairs]
        order = sorted(range(len(pairs)), key=lambda position: lengths[position])
        self.parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        batches = ([pairs[position] for position in part] for part in self.parts)
        self.batches = [{n: x.to(device) for n, x in pair_batch(tokenizer, rows).items()} for rows in batches]
        self.trunk = _trunk(model)
        inputs = ("input_ids", "attention_mask")
        self.entries = [self.trunk.hidden_states(*(b[n] for n in inputs)) if self.trunk else None for b in self.batches]

    @torch.no_grad()
    def logps(self) -> Tensor:
        """log π (N, 2) in nats of each pair's answers under the model as it is now, in float64."""
        found = torch.zeros(self.size, 2, dtype=torch.float64)
        with evaluating(self.model):
            for part, batch, entry in zip(self.parts, self.batches, self.entries, strict=True):
                with self.trunk.skipped(entry) if self.trunk and entry is not None else nullcontext():
                    found[part] = answer_logps(self.model, batch).cpu()
        return found

    def lengths(self) -> Tensor:
        """Tokens (N, 2) of each pair's answers."""
        found = torch.zeros(self.size, 2, dtype=torch.long)
        for part, batch in zip(self.parts, self.batches, strict=True):
            found[part] = torch.stack(batch["completion_mask"].sum(1).chunk(2), 1).cpu()
        return found


def _trunk(model: Any) -> Trunk | None:
    """What lies below the active axes; `None` where nothing does, or the model can not be cut there."""
    if not any(layer.carried_axes() for layer in tangent_layers(model)):
        return None
    root = tangent_tuner(model).model
    blocks = find_blocks(root)
    try:
        return Trunk(root, root.get_submodule(blocks[0])) if blocks else None
    except ValueError:
        return None


def answer_logps(model: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """log π (P, 2) of the answers of a `pair_batch`; the head and all that follows in float32, whatever the dtype."""
    root: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    output = find_head(root)
    carried = output.uniform_axes() if isinstance(output, TangentLayer) else {}
    ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    inputs = {name: x for name, x in batch.items() if name != "completion_mask"}
    hidden = root.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    head, wanted = head_of(root, output, carried), mask[:, 1:]
    weight = _moved_weight(head)
    bias = None if head.bias is None else head.bias.float()
    rows, labels = wanted.nonzero()[:, 0], ids[:, 1:][wanted]
    sums = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    tiles = (x.split(TILE) for x in (hidden[wanted], labels, rows))
    for states, label, row in zip(*tiles, strict=True):
        logits = F.linear(states.float(), weight, bias) * head.scale
        logits = logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
        sums.index_add_(0, row, logits.log_softmax(1).gather(1, label[:, None])[:, 0].double())
    return torch.stack(sums.chunk(2), 1)


def _moved_weight(head: Head) -> Tensor:
    """W + Σ λᵢ ΔWᵢ (V, D) of the head, in float32."""
    weight = head.weight.float()
    if head.dense is not None:
        weight = weight + head.dense.float()
    return weight if head.b is None or head.a is None else weight + head.b.float() @ head.a.float()
