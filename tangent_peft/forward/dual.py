"""Opening and closing the dual level around a model's forward.

A linearized pass computes f_lin(x; τ) = f(x; θ₀) + J_θ₀ f(x)·τ (TS-DPO, arXiv 2602.01128) in forward mode: above the
first tangent every tensor carries its value, the *primal*, and its directional derivative, the *tangent*. `linearize`
hooks a model so that each call opens a level of `torch.autograd.forward_ad`, runs, joins primal + tangent where the
tangent ends, and closes the level before anyone calls `backward`: autograd then holds the graph of the tangents alone.

This file knows modules that carry tangents (`TangentCarrier`) but not where these come from: neither PEFT nor λ.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from tangent_peft.forward.attention import derive_attention
from tangent_peft.forward.cache import refuse_lost_tangents, reveal_cross_attention
from tangent_peft.forward.carrier import Gradient, TangentCarrier
from tangent_peft.forward.exits import TangentExit, find_exit, find_head
from tangent_peft.forward.experts import derive_experts
from tangent_peft.forward.level import (
    LinearizedPass,
    carries_tangent,
    close_interrupted_pass,
    close_pass,
    current_pass,
    dual,
    join,
    map_tensors,
    open_pass,
    refuse_compilation,
    split,
)
from tangent_peft.forward.losses import asks_for_loss, join_at_losses, refuse_linearized_loss
from tangent_peft.forward.norms import derive_norms
from tangent_peft.forward.opaque import OpaqueLinear
from tangent_peft.forward.randomness import random_state, refuse_randomness
from tangent_peft.forward.replay import replay_blocks, replayable_blocks
from tangent_peft.forward.rotary import derive_rotations
from tangent_peft.forward.rules import carry_through_engines, derive_host_code
from tangent_peft.forward.structure import Structure
from tangent_peft.forward.support import is_model, refuse_hub_kernels


class LinearizedForward:
    """The hooks that make each call of a module a linearized pass, as long as one of its carriers has a tangent.

    Args:
        root: the module whose call is one forward pass.
        carriers: all modules of `root` at which a tangent may be born.
        opaque: quantized layers of `root`, whose derivatives are given by rule.
    """

    def __init__(
        self, root: nn.Module, carriers: Iterable[TangentCarrier], opaque: Iterable[OpaqueLinear] = ()
    ) -> None:
        self.root, self.carriers = root, list(carriers)
        self._forced: Gradient | None = None
        self._structure: Structure | None = None
        head = find_head(root)
        self.guarded = [carrier for carrier in self.carriers if carrier is head]
        exit_ = find_exit(root, set(self.carriers))
        self.handles = [
            root.register_forward_pre_hook(self._open, with_kwargs=True),
            root.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]
        self._ends_at_root = exit_.module is root
        if not self._ends_at_root:  # what leaves the root is joined as the pass closes
            self.handles.append(self._register_exit(exit_))
        self.handles += [handle for rule in opaque for handle in rule.register()]

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
        return self._look()[0]

    def _look(self) -> tuple[Hashable | None, list[TangentCarrier]]:
        """The tangents of the next pass, and the carriers that have none."""
        mixes = [carrier.tangent_mix() for carrier in self.carriers]
        without = [carrier for carrier, mix in zip(self.carriers, mixes, strict=True) if mix is None]
        return frozenset(mix for mix in mixes if mix is not None) or None, without

    def _open(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        close_interrupted_pass()
        running = current_pass()
        if running is not None and running.root is root:
            running.depth += 1  # the root calls itself: still the same pass
            return
        mix, without = self._look()
        if mix is None:
            self._guard(True)
            return
        refuse_compilation(root)
        _refuse_additive(without)
        self._structure = Structure.of(root, self._structure)
        opened = open_pass(root, mix, sys._getframe(1), self._structure)
        self._guard(True)  # not before: the pass of another thread that just ended took it away
        try:
            refuse_hub_kernels(opened)
            derive_attention(opened)
            derive_host_code(opened)
            derive_experts(opened)
            if not torch.is_grad_enabled():  # recorded, they would keep more than what they stand for
                derive_norms(opened)
                derive_rotations(opened)
            if root.training or torch.is_grad_enabled():  # a decoding step has nothing to replay
                replay_blocks(opened, self._gradient(), self._forced is None, kwargs)
            freeze_input(opened)
            carry_through_engines(opened)
            if root.training and torch.is_grad_enabled():
                opened.random_state = random_state(_device(root))
            reveal_cross_attention(opened, kwargs.get("past_key_values"))
            if self._ends_at_root:
                join_at_losses(opened, args, kwargs)
        except BaseException:
            close_pass(opened)
            raise

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Has passes inside the `with` block replay all blocks that can be, whatever the carriers ask for."""
        before, self._forced = self._forced, "replay" if replayable_blocks(self.root) else None
        try:
            yield
        finally:
            self._forced = before

    def _gradient(self) -> Gradient:
        if self._forced is not None:
            return self._forced
        modes = set[Gradient]().union(*(carrier.gradient_modes() for carrier in self.carriers)) - {"auto"}
        if len(modes) > 1:
            raise ValueError(
                "Some active axes ask for `gradient='recorded'` and others for `gradient='replay'`, and one pass can "
                "not do both. Give them the same, or 'auto', in TangentConfig."
            )
        return modes.pop() if modes else "auto"

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
            _check_randomness(running)
            refuse_lost_tangents(args, kwargs, output)
            return _leave_root(running, output, asks_for_loss(root, args, kwargs))
        finally:
            self._guard(False)
            close_pass(running)


def _refuse_additive(without: list[TangentCarrier]) -> None:
    """Refuses to linearize in some carriers while in others, those without a tangent, axes add their weights."""
    if any(carrier.is_additive() for carrier in without):
        raise ValueError(
            "Some active axes are linearized and others (linearize=False) add their weights; f_lin is the "
            "expansion at the frozen weights and can not mix the two. Activate one kind, or evaluate all of them "
            "as weights inside `with model.linearized(False):`."
        )


def _device(root: nn.Module) -> str:
    return next((p.device.type for p in root.parameters()), "cpu")


def freeze_input(opened: LinearizedPass) -> None:
    """Until the pass closes, the input embeddings give no gradient unless they train.

    Gradient checkpointing of ordinary adapters makes them require one (`enable_input_require_grads`), for torch's
    reentrant kind. Here it would make autograd record the primal, of which nothing trains.
    """
    if not torch.is_grad_enabled():
        return
    for model in opened.structure.select(is_model):
        try:
            embedding = model.get_input_embeddings()
        except NotImplementedError:  # as in `enable_input_require_grads`, which asks every model inside as well
            continue
        if isinstance(embedding, nn.Module):
            opened.contexts.callback(embedding.register_forward_hook(_detach_frozen).remove)


def _detach_frozen(module: nn.Module, args: Any, output: Any) -> Any:
    tangents = {p for m in module.modules() if isinstance(m, TangentCarrier) for p in m.tangent_parameters()}
    if not isinstance(output, Tensor) or any(p.requires_grad and p not in tangents for p in module.parameters()):
        return output
    primal, tangent = split(output)
    return dual(primal.detach(), tangent)


def _check_randomness(running: LinearizedPass) -> None:
    """At the exit: what follows works on linearized values, of which dropout is nobody's reference."""
    if running.random_state is not None:
        refuse_randomness(running.random_state, _device(running.root), type(running.root).__name__)
        running.random_state = None


def _leave_root(running: LinearizedPass, output: Any, asked: bool) -> Any:
    """Joins whatever is still dual; a loss must not be, it was then computed on something still being linearized."""
    if isinstance(output, dict) and carries_tangent(output.get("aux_loss")):
        raise NotImplementedError(
            f"{type(running.root).__name__} computed its load-balancing loss (`aux_loss`) on dual router logits; that "
            "is the linearized loss. Call it without `output_router_logits`: the router is frozen."
        )
    refuse_linearized_loss(running.root, output, asked)
    return map_tensors(output, join)


def _join_outputs(module: nn.Module, args: Any, output: Any) -> Any:
    running = current_pass()
    if running is None:
        return output
    _check_randomness(running)
    if isinstance(output, dict) and "last_hidden_state" in output:
        running.hidden = split(output["last_hidden_state"])
    refuse_lost_tangents((), {}, output)
    return map_tensors(output, join)


def _join_inputs(module: nn.Module, args: Any) -> Any:
    running = current_pass()
    if running is None:
        return args
    _check_randomness(running)
    return map_tensors(args, join)
