"""The residual stream of a decoder, layer by layer: what enters its first block, and what leaves each one.

Layer 0 is what enters block 0, layer ℓ what leaves block ℓ − 1, all before the final norm. (transformers' own
`hidden_states` apply that norm to the last one.) The head does not run. Letters: L blocks, B rows, T tokens, D hidden
size, n positions that are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.forward import split
from tangent_peft.tuner.targets import find_blocks


class _LastBlock(Exception):
    """The forward has come to the end of the last block."""


def decoder_blocks(root: nn.Module) -> nn.ModuleList:
    """The blocks of a decoder, in order.

    Raises:
        TypeError: if the model has no list of blocks.
    """
    found = find_blocks(root)
    blocks = None if found is None else root.get_submodule(found[0])
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"{type(root).__name__} has no list of blocks, so it has no layers to look at.")
    return blocks


def check_layer(index: int, layers: int) -> int:
    """A layer's index from 0 to `layers`; negative ones count from the end.

    Raises:
        IndexError: naming the range.
    """
    if not -layers - 1 <= index <= layers:
        raise IndexError(
            f"Layer {index} is out of range: the model has the layers 0 (what enters the first block) to {layers} "
            f"(what leaves the last one)."
        )
    return index % (layers + 1)


@torch.no_grad()
def layer_states(root: PreTrainedModel, inputs: Mapping[str, Tensor], keep: Tensor) -> Tensor:
    """The residual stream at some positions, of the model in the state it is in (`with state.active() as root`).

    Args:
        root: a transformers decoder, inside of PEFT or not.
        inputs: `input_ids` (B, T) and what else its forward takes.
        keep: the positions wanted (B, T), as booleans.

    Returns:
        (L + 1, n, D) in float32 on the model's device, positions row by row; of a linearized model primal + tangent.
    """
    primal, tangent = _observed(root, inputs, keep)
    return primal if tangent is None else primal.add_(tangent)


@torch.no_grad()
def layer_tangents(root: PreTrainedModel, inputs: Mapping[str, Tensor], keep: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream of the base and its exact shift J·Δ along the active mix of a linearized model.

    Args:
        root: a transformers decoder with tangent axes, inside `with ModelState.mix(…, linearized=True).active()`.
        inputs: as `layer_states`.
        keep: as `layer_states`.

    Returns:
        h(θ₀) and J·Δ, both (L + 1, n, D) in float32; the shift is 0 below the first block with a tangent.
    """
    primal, tangent = _observed(root, inputs, keep)
    return primal, torch.zeros_like(primal) if tangent is None else tangent


def row_means(states: Tensor, keep: Tensor) -> Tensor:
    """The mean over the kept positions of each row: (L + 1, n, D) to (L + 1, B, D).

    Raises:
        ValueError: if a row has no such position.
    """
    counts = keep.sum(1)
    if bool((counts == 0).any()):
        row = int((counts == 0).nonzero()[0])
        raise ValueError(f"Row {row} of the batch has no position to take the mean over. Leave it out.")
    rows = keep.nonzero()[:, 0].to(states.device)
    sums = states.new_zeros(states.shape[0], len(keep), states.shape[2]).index_add_(1, rows, states)
    return sums / counts.to(states)[None, :, None]


def _observed(root: PreTrainedModel, inputs: Mapping[str, Tensor], keep: Tensor) -> tuple[Tensor, Tensor | None]:
    blocks = decoder_blocks(root)
    found: list[tuple[Tensor, Tensor | None]] = []

    def note(hidden: Tensor) -> None:
        primal, tangent = split(hidden)
        where = keep.to(primal.device)
        found.append((primal[where].float(), None if tangent is None else tangent[where].float()))

    with _watched(blocks, note), suppress(_LastBlock):
        root(**inputs, use_cache=False)
    if len(found) != len(blocks) + 1:
        raise RuntimeError(
            f"{len(found)} of {len(blocks) + 1} layers of {type(root).__name__} were seen in its forward: it does not "
            "run each of its blocks once. Its layers can not be looked at."
        )
    device = found[-1][0].device
    primal = torch.stack([h.to(device) for h, _ in found])
    if all(tangent is None for _, tangent in found):
        return primal, None
    return primal, torch.stack([torch.zeros_like(h) if t is None else t.to(device) for h, t in found])


@contextmanager
def _watched(blocks: nn.ModuleList, note: Callable[[Tensor], None]) -> Iterator[None]:
    """Shows what enters the first block and leaves each one, and ends the forward after the last."""

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        note(args[0] if args else kwargs["hidden_states"])

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        note(output if isinstance(output, Tensor) else output[0])
        if module is blocks[-1]:
            raise _LastBlock

    with ExitStack() as stack:
        stack.callback(blocks[0].register_forward_pre_hook(entering, with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.register_forward_hook(leaving).remove)
        yield
