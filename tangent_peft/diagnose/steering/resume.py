"""Running a forward on from a layer: the blocks below run once per batch, however often what is above is asked for.

A steered forward differs from the plain one only above the layer that is steered. For the last layer, the default of
D-STEER, what is left is the final norm and the head, so a sweep over λ and control directions costs little more than
the heads. Whether a model can be cut there is not assumed: the first logits must be exactly those of a whole forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.diagnose.activations import decoder_blocks
from tangent_peft.forward import split
from tangent_peft.forward.level import dual


class Resumable:
    """What leaves one block of a model, kept from a forward and given again to later ones of the same batch.

    Args:
        root: a transformers decoder.
        layer: from 1 to L, what leaves block ℓ − 1.
    """

    def __init__(self, root: PreTrainedModel, layer: int) -> None:
        self.blocks = list(decoder_blocks(root))[:layer]
        self.exact: bool | None = None  # not known before the first batch
        self._hidden: tuple[Tensor, Tensor | None] | None = None
        self._lengths: list[int | None] = []  # of the tuple that a block gives; `None`: a tensor

    def first(self, logits: Callable[[], Tensor]) -> Tensor:
        """The logits of a forward that runs as a whole, after which `resumed` runs on from its hidden states.

        Args:
            logits: runs the model on a batch.
        """
        self._lengths.clear()
        handles = [block.register_forward_hook(self._note) for block in self.blocks]
        try:
            whole = logits()
        finally:
            for handle in handles:
                handle.remove()
        if self.exact is None:
            self.exact = len(self._lengths) == len(self.blocks) and self._is_exact(whole, logits)
        return whole

    def resumed(self) -> Any:
        """A context whose forwards, of the same batch, start above the layer; whole ones if it can not be cut there."""
        return self._skipping() if self.exact else nullcontext()

    def _is_exact(self, whole: Tensor, logits: Callable[[], Tensor]) -> bool:
        with self._skipping():
            return torch.equal(logits(), whole)  # the same operations on the same numbers

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        self._lengths.append(len(output) if isinstance(output, tuple) else None)
        if module is self.blocks[-1]:
            self._hidden = split(output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def _skipping(self) -> Iterator[None]:
        before = [(vars(block), vars(block).get("forward")) for block in self.blocks]
        try:
            for block, length in zip(self.blocks, self._lengths, strict=True):
                vars(block)["forward"] = self._given(length, block is self.blocks[-1])
            yield
        finally:
            for attributes, forward in before:
                attributes.pop("forward", None)
                if forward is not None:
                    attributes["forward"] = forward

    def _given(self, length: int | None, last: bool) -> Callable[..., Any]:
        """A block's forward that gives its input or, in the last of the skipped blocks, the hidden states kept."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if last and self._hidden is not None:
                hidden = dual(*self._hidden)
            return hidden if length is None else (hidden, *[None] * (length - 1))

        return forward
