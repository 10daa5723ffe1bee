"""Hidden states at the head and their tangents along each axis: one linearized pass per axis, and no logits.

The frozen trunk below the first block with a tangent is the same in all passes and runs once per batch, where the model
can be cut there. `AxisPasses` also verifies, on a few tokens, that the head is what `head_of` takes it for. Knows no
trainer, no loss, no λ but 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.forward import current_pass, evaluating, find_head, is_sharded, split
from tangent_peft.forward.head import Head
from tangent_peft.forward.trunk import Trunk
from tangent_peft.tuner.axes import check_known, check_unmerged, preserved, refuse_saved_modules, switch, tangent_tuner
from tangent_peft.tuner.heads import head_of
from tangent_peft.tuner.targets import find_blocks


PROBE_TOKENS = 8  # of the first row, on which the head is verified
PROBE_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
TRUNK_INPUTS = {"input_ids", "attention_mask"}  # what the trunk may depend on


class _BackboneDone(Exception):
    """The forward has come to the end of the backbone."""


class AxisPasses:
    """The linearized passes of some axes of `model`, each at λ = 1 with the others off.

    Args:
        model: a `PeftModel` with tangent axes.
        axes: their names; all axes of the model by default.

    Attributes:
        axes: the names, in order.
        heads: the head with each axis's own tangent; they share W, b, scale and soft-cap.

    Raises:
        TypeError: if the model carries no tangent axes, or its head is not an affine layer.
        ValueError: for unknown, repeated or no axes, axes that keep modules of their own, merged or sharded weights.
    """

    def __init__(self, model: nn.Module, axes: Sequence[str] | None = None) -> None:
        self.tuner = tangent_tuner(model)
        self.axes = list(self.tuner.peft_config) if axes is None else list(axes)
        _check_axes(self.axes)
        check_known(self.tuner, self.axes)
        check_unmerged(self.tuner)
        refuse_saved_modules(self.tuner, self.axes)
        self.root: Any = self.tuner.model
        head = find_head(self.root)
        if not isinstance(self.root, PreTrainedModel) or head is None or self.root.base_model is self.root:
            raise TypeError(
                f"{type(self.root).__name__} has no affine head above a backbone, so its log-probs can not be computed "
                "from hidden states. Score each mix by itself (`pair_logps`, inside `with model.axes({...}):`)."
            )
        if any(is_sharded(parameter) for parameter in self.root.parameters()):
            raise ValueError("The weights are sharded over processes. Load the model whole to score many mixes.")
        if self.root.config.is_encoder_decoder:
            raise TypeError(f"{type(self.root).__name__} is an encoder-decoder; only decoders are scored in one pass.")
        self.heads = [_detached(head_of(self.root, head, {axis: 1.0})) for axis in self.axes]
        self._trunk: Trunk | None = None
        self._verified = False

    @property
    def device(self) -> torch.device:
        """Where the model's tokens go."""
        return next(self.root.base_model.parameters()).device

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Eval mode, linearized and without gradients for the duration of a `with` block; finds the trunk."""
        with torch.no_grad(), self.tuner.linearized(True), evaluating(self.root):
            with self._at(dict.fromkeys(self.axes, 1.0)):
                self._trunk = trunk_of(self.root)
            yield

    def states(self, inputs: Mapping[str, Any], keep: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """What enters the head at the positions of interest; inside `ready`.

        Args:
            inputs: of the model, with `input_ids` (B, T).
            keep: which positions are wanted (B, T).

        Returns:
            h (N, D), and ḣ (N, D) of each axis, `None` where an axis changes nothing below the head.
        """
        if not self._verified:
            self._verify(inputs)
        trunk, below = self._trunk, None
        if trunk is not None and set(inputs) <= TRUNK_INPUTS:
            below = trunk.hidden_states(**inputs)
        hidden: Tensor | None = None
        tangents: list[Tensor | None] = []
        for axis in self.axes:
            skipped = nullcontext() if trunk is None or below is None else trunk.skipped(below)
            with self._at({axis: 1.0}), skipped:
                primal, tangent = self._backbone(inputs)
            hidden = primal[keep] if hidden is None else hidden
            tangents.append(None if tangent is None else tangent[keep])
        assert hidden is not None
        return hidden, tangents

    @contextmanager
    def _at(self, weights: Mapping[str, float]) -> Iterator[None]:
        """A mix that is linearized, so that no stored range of λ, which is about weights, is warned of."""
        with preserved(self.tuner):
            switch(self.tuner, weights)
            yield

    def _backbone(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Primal and tangent (B, T, D) of the backbone's last hidden state in the active mix; the head does not run."""
        found: list[tuple[Tensor, Tensor | None]] = []

        def stop(states: tuple[Tensor, Tensor | None]) -> None:
            found.append(states)
            raise _BackboneDone

        with self._watched(stop), suppress(_BackboneDone):
            self.root(**inputs, use_cache=False)
        return found[0]

    @contextmanager
    def _watched(self, found: Callable[[tuple[Tensor, Tensor | None]], None]) -> Iterator[None]:
        """Hands the backbone's last hidden state to `found`, before the pass joins it."""

        def read(module: nn.Module, args: Any, output: Any) -> None:
            if current_pass() is None:
                raise RuntimeError(f"{type(self.root).__name__} ran without a linearized pass; its axes carry nothing.")
            found(split(output.last_hidden_state))

        handle = self.root.base_model.register_forward_hook(read, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    def _verify(self, inputs: Mapping[str, Any]) -> None:
        """The model's own linearized logits are those of the head as it was read, on a few tokens of each axis."""
        if set(inputs) <= TRUNK_INPUTS:
            inputs = {name: value[:1, :PROBE_TOKENS] for name, value in inputs.items()}
        for axis, head in zip(self.axes, self.heads, strict=True):
            states: list[tuple[Tensor, Tensor | None]] = []
            with self._at({axis: 1.0}), self._watched(states.append):
                expected = self.root(**inputs, use_cache=False).logits[0]
            primal, tangent = states[0]
            found = _logits(head, primal[0], None if tangent is None else tangent[0])
            if not (found.isfinite().all() and expected.isfinite().all()):
                raise ValueError(
                    f"The linearized logits of axis {axis!r} are not finite. Look for values in the axis, or in the "
                    "base, that are not, or that overflow the dtype."
                )
            error = float((found - expected.to(found.dtype)).abs().max() / expected.abs().max().clamp(min=1e-30))
            if not error <= PROBE_TOLERANCE[expected.dtype]:
                raise TypeError(
                    f"The logits of {type(self.root).__name__} are not s·(W h + b), soft-capped, of its last hidden "
                    f"state h (axis {axis!r}: relative error {error:.1e}), so many mixes can not be scored from one "
                    "pass. Score each mix by itself (`pair_logps`, inside `with model.axes({...}):`)."
                )
        self._verified = True


def trunk_of(root: PreTrainedModel) -> Trunk | None:
    """The part of a model below all active axes; `None` where it can not be cut, and every pass is a whole one."""
    found = find_blocks(root)
    blocks = None if found is None else root.get_submodule(found[0])
    if not isinstance(blocks, nn.ModuleList):
        return None
    try:
        return Trunk(root, blocks)
    except ValueError:
        return None


def _detached(head: Head) -> Head:
    tensors: dict[str, Any] = {name: x.detach() for name, x in vars(head).items() if isinstance(x, Tensor)}
    return replace(head, **tensors)


def _check_axes(axes: Sequence[str]) -> None:
    if not axes:
        raise ValueError("No axes are given. Name those to score, as `axes=['help', 'verb']`.")
    twice = sorted({axis for axis in axes if list(axes).count(axis) > 1})
    if twice:
        raise ValueError(f"Axes {twice} are named more than once in {list(axes)}. Name each axis once.")


def _logits(head: Head, hidden: Tensor, tangent: Tensor | None) -> Tensor:
    """The linearized logits (n, V) at λ = 1, written out."""
    joined = hidden if tangent is None else hidden + tangent
    logits = joined @ head.weight.mT
    if head.bias is not None:
        logits = logits + head.bias
    if head.dense is not None:
        logits = logits + hidden @ head.dense.to(hidden.dtype).mT
    if head.b is not None and head.a is not None:
        logits = logits + (hidden @ head.a.to(hidden.dtype).mT) @ head.b.to(hidden.dtype).mT
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)
