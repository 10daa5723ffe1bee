"""Adding vectors to the residual stream of a model while it runs: h + s at what leaves some of its blocks.

In an ordinary forward the sum is what the blocks above see. In a linearized pass, where a hidden state is primal and
tangent, s joins the tangent: the result is f(x; θ₀) + J_θ·τ + J_h·s, to first order in the vector as it is in the axes,
so that subtracting exactly what a mix has added gives the base exactly. Nothing that a tensor carries is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.diagnose.activations import decoder_blocks
from tangent_peft.forward import current_pass, split
from tangent_peft.forward.level import dual


Positions = Literal["all", "generated"]


@contextmanager
def steered(
    root: PreTrainedModel,
    shifts: Mapping[int, Tensor],
    positions: Positions = "all",
    preserve_norm: bool = False,
) -> Iterator[None]:
    """Adds vectors to what blocks of `root` give, for a `with` block; blocks inside one another add up.

    Args:
        root: a transformers decoder, inside of PEFT or not.
        shifts: what to add (D,), by layer from 1 to L: layer ℓ is what leaves block ℓ − 1.
        positions: `"all"`, or `"generated"`: those from which an answer's tokens are chosen, which are the last one of
            a prompt and then each token that is generated with a key/value cache, one at a time.
        preserve_norm: give each sum the norm that the hidden state had.

    Raises:
        ValueError: for a layer out of range, a vector of another size, or other positions; by the forward, for
            `"generated"` without a cache, and for `preserve_norm` in a linearized pass.
        RuntimeError: by the forward, for a linearized pass in training mode.
    """
    if positions not in ("all", "generated"):
        raise ValueError(f'`positions` is "all" or "generated"; found {positions!r}.')
    blocks = decoder_blocks(root)
    wrong = [layer for layer in shifts if not 1 <= layer <= len(blocks)]
    if wrong:
        raise ValueError(f"Layers {wrong} leave no block; {type(root).__name__} has layers 1 to {len(blocks)}.")
    with ExitStack() as stack:
        places = _Places()
        if positions == "generated":
            stack.callback(root.register_forward_pre_hook(places.look, with_kwargs=True).remove)
        for layer, shift in shifts.items():
            hook = _Shift(shift, places, preserve_norm)
            stack.callback(blocks[layer - 1].register_forward_hook(hook).remove)
        yield


class _Places:
    """Which positions of the forward that runs are steered: (B, T) as booleans, or `None`: all."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    def look(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        tokens = args[0] if args else kwargs.get("input_ids")
        tokens = kwargs["inputs_embeds"] if tokens is None else tokens
        rows, length = tokens.shape[:2]
        self.mask = None
        if length == 1:
            return
        if kwargs.get("past_key_values") is None:
            raise ValueError(
                f"A forward of {length} tokens without a key/value cache does not tell which of them were generated. "
                'Generate with `use_cache=True`, or steer with `positions="all"`.'
            )
        real = kwargs.get("attention_mask")
        self.mask = torch.zeros(rows, length, dtype=torch.bool, device=tokens.device)
        last = torch.full((rows,), length - 1, device=tokens.device)
        if isinstance(real, Tensor) and real.ndim == 2:
            last = length - 1 - real[:, -length:].flip(1).long().argmax(1)  # of the tokens that are not padding
        self.mask[torch.arange(rows, device=tokens.device), last] = True


class _Shift:
    """A forward hook of a block that adds a vector (D,) to its output."""

    def __init__(self, shift: Tensor, places: _Places, preserve_norm: bool) -> None:
        self.shift, self.places, self.preserve_norm = shift, places, preserve_norm

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self.moved(module, output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (self.moved(module, output[0]), *output[1:])
        raise ValueError(f"{type(module).__name__} gives a {type(output).__name__}, not hidden states to steer.")

    def moved(self, module: nn.Module, hidden: Tensor) -> Tensor:
        if self.shift.shape != hidden.shape[-1:]:
            raise ValueError(f"A vector {tuple(self.shift.shape)} can not be added to states {tuple(hidden.shape)}.")
        if current_pass() is not None:
            return self._linearized(module, hidden)
        # Sum in the wider of the two dtypes, one rounding; on a dual tensor all of it keeps the tangent.
        wide = torch.promote_types(hidden.dtype, self.shift.dtype)
        states = hidden.to(wide)
        moved = states + self.shift.to(hidden.device, wide)
        if self.preserve_norm:
            size = moved.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
            moved = moved * (states.norm(dim=-1, keepdim=True) / size)
        moved = moved.to(hidden.dtype)
        mask = self.places.mask
        return moved if mask is None else torch.where(mask.to(hidden.device)[..., None], moved, hidden)

    def _linearized(self, module: nn.Module, hidden: Tensor) -> Tensor:
        if module.training:
            raise RuntimeError(
                "A linearized model in training mode is not steered: replayed gradients would not see the vector. Call "
                "`model.eval()`, or train outside of the steering block."
            )
        if self.preserve_norm:
            raise ValueError(
                "Keeping the norm is not linear in the vector, so it has no place in a linearized pass. Leave out "
                "`preserve_norm`, or run the model with `model.linearized(False)`."
            )
        primal, tangent = split(hidden)
        step = self.shift.to(primal).expand_as(primal)
        if self.places.mask is not None:
            step = step * self.places.mask.to(primal.device)[..., None]
        return dual(primal, step.contiguous() if tangent is None else tangent + step)
