"""Opening and closing the dual level around a model's forward.

A linearized pass computes f_lin(x; τ) = f(x; θ₀) + J_θ₀ f(x)·τ (TS-DPO, arXiv 2602.01128) in forward mode: above the
first tangent every tensor carries its value, the *primal*, and its directional derivative, the *tangent*. `linearize`
hooks a model so that each call opens a level of `torch.autograd.forward_ad`, runs, joins primal + tangent where the
tangent ends, and closes the level before anyone calls `backward`: autograd then holds the graph of the tangents alone.

This file knows modules that carry tangents (`TangentCarrier`) but not where these come from: neither PEFT nor λ.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Hashable, Iterable
from types import MethodType
from typing import Any

from torch import nn

from tangent_peft.forward.attention import derive_attention
from tangent_peft.forward.cache import refuse_lost_tangents, reveal_cross_attention
from tangent_peft.forward.exits import TangentExit, find_exit, find_head
from tangent_peft.forward.level import (
    LinearizedPass,
    carries_tangent,
    close_interrupted_pass,
    close_pass,
    current_pass,
    join,
    map_tensors,
    open_pass,
    refuse_compilation,
    split,
)


class TangentCarrier(nn.Module):
    """Abstract: a module of the linearized model at which a tangent may be born."""

    #: While true, reading `.weight` instead of calling the module must fail: the tangent would be lost.
    tangent_guarded: bool = False

    @abstractmethod
    def tangent_mix(self) -> Hashable | None:
        """Identifies the tangent carried now; `None` when there is none.

        Equal values mean equal tangents: a key/value cache filled under one mix is not read under another.
        """

    @abstractmethod
    def is_additive(self) -> bool:
        """Whether the module currently adds a ΔW to its weights instead of carrying it as a tangent."""


class LinearizedForward:
    """The hooks that make each call of a module a linearized pass, as long as one of its carriers has a tangent.

    Args:
        root: the module whose call is one forward pass.
        carriers: all modules of `root` at which a tangent may be born.
    """

    def __init__(self, root: nn.Module, carriers: Iterable[TangentCarrier]) -> None:
        self.carriers = list(carriers)
        head = find_head(root)
        self.guarded = [carrier for carrier in self.carriers if carrier is head]
        exit_ = find_exit(root, set(self.carriers))
        self.handles = [
            root.register_forward_pre_hook(self._open, with_kwargs=True),
            root.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]
        if exit_.module is not root:  # what leaves the root is joined as the pass closes
            self.handles.append(self._register_exit(exit_))

    def _register_exit(self, exit_: TangentExit) -> Any:
        if exit_.side == "input":
            return exit_.module.register_forward_pre_hook(_join_inputs)
        return exit_.module.register_forward_hook(_join_outputs)

    @staticmethod
    def installed(root: nn.Module) -> LinearizedForward | None:
        """The hooks that are on `root`, or `None`."""
        methods = (hook for hook in root._forward_pre_hooks.values() if isinstance(hook, MethodType))
        return next((m.__self__ for m in methods if isinstance(m.__self__, LinearizedForward)), None)

    def remove(self) -> None:
        """Takes the hooks away: the model is an ordinary one again."""
        for handle in self.handles:
            handle.remove()

    def mix(self) -> Hashable | None:
        """The tangents of the next pass, or `None` if it will be an ordinary one."""
        mixes = frozenset(mix for carrier in self.carriers if (mix := carrier.tangent_mix()) is not None)
        return mixes or None

    def _open(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        close_interrupted_pass()
        running = current_pass()
        if running is not None and running.root is root:
            running.depth += 1  # the root calls itself: still the same pass
            return
        mix = self.mix()
        if mix is None:
            self._guard(True)
            return
        refuse_compilation(root)
        self._check(root)
        opened = open_pass(root, mix, caller=sys._getframe(1))
        self._guard(True)  # not before: the pass of another thread that just ended took it away
        try:
            derive_attention(opened)
            reveal_cross_attention(opened, kwargs.get("past_key_values"))
        except BaseException:
            close_pass(opened)
            raise

    def _check(self, root: nn.Module) -> None:
        if any(carrier.is_additive() for carrier in self.carriers):
            raise ValueError(
                "Some active axes are linearized and others (linearize=False) add their weights; f_lin is the "
                "expansion at the frozen weights and can not mix the two. Activate one kind, or evaluate all of them "
                "as weights inside `with model.linearized(False):`."
            )
        if root.training and _is_checkpointing(root):  # the reentrant kind drops tangents without gradients as well
            raise ValueError(
                f"{type(root).__name__} has gradient checkpointing enabled: its recomputation happens outside the dual "
                "level and would lose the tangents. Call `model.gradient_checkpointing_disable()` (or "
                "`model.eval()` for inference), or set `gradient_checkpointing=False` in the training arguments."
            )

    def _guard(self, guarded: bool) -> None:
        for carrier in self.guarded:
            carrier.tangent_guarded = guarded

    def _close(self, root: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        running = current_pass()
        if running is None or running.root is not root:
            self._guard(False)
            return None
        if running.depth > 0:
            running.depth -= 1
            return None
        try:
            if output is None:
                return None
            refuse_lost_tangents(args, kwargs, output)
            return _leave_root(running, output)
        finally:
            self._guard(False)
            close_pass(running)


def _is_checkpointing(root: nn.Module) -> bool:
    return any(vars(module).get("gradient_checkpointing", False) for module in root.modules())


def _leave_root(running: LinearizedPass, output: Any) -> Any:
    """Joins whatever is still dual; a loss must not be, it was then computed on something still being linearized."""
    loss = output.get("loss") if isinstance(output, dict) else None
    if carries_tangent(loss):
        raise NotImplementedError(
            f"{type(running.root).__name__} computed its loss on dual logits; that is the linearized loss, not the "
            "loss of the linearized logits. Call the model without labels and compute the loss from its logits."
        )
    return map_tensors(output, join)


def _join_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    running = current_pass()
    if running is None:
        return output
    if isinstance(output, dict) and "last_hidden_state" in output:
        running.hidden = split(output["last_hidden_state"])
    refuse_lost_tangents((), {}, output)
    return map_tensors(output, join)


def _join_inputs(module: nn.Module, args: Any) -> Any:
    return args if current_pass() is None else map_tensors(args, join)
