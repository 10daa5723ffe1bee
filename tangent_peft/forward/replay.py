"""The replayed gradient: a block runs dual without a graph, and backward replays it as an ordinary network.

f_lin is linear in τ, so its gradient Jᵀg is the vector-Jacobian product of the frozen network at θ₀. For one block with
primal input x, tangent input ẋ and tangents τ inside,

    ẏ = J_x ẋ + J_τ τ        forward: dual numbers, nothing is kept but x
    ẋ: J_xᵀ g   τ: J_τᵀ g     backward: the stock forward of the block from x, then its stock backward

Inside the replay a wrapped layer returns W x + b and its backward also leaves gᵀx with τ (`deposit.py`). So the replay
runs the user's own attention kernel and differentiates nothing but the network itself: this is gradient checkpointing,
at its usual price of one more forward of the wrapped blocks. The two directions share no code, which gives the adjoint
identity ⟨g, Jτ⟩ = ⟨τ, Jᵀg⟩ its force.

Seam: transformers hands each checkpointed block to the `_gradient_checkpointing_func` it carries. While a linearized
pass is open these are ours, whatever kind of checkpointing was chosen: torch's reentrant kind would lose the tangents,
the other would recompute them outside of the dual level.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from tangent_peft.forward.carrier import Gradient, TangentCarrier
from tangent_peft.forward.deposit import replaying
from tangent_peft.forward.level import LinearizedPass, carries_tangent, dual, map_tensors, split
from tangent_peft.forward.randomness import random_state, refuse_randomness
from tangent_peft.forward.sharding import is_sharded


# ---- a block ---------------------------------------------------------------------------------------------------------


class _Hole:
    """Stands where a tensor belongs that autograd keeps."""


@dataclass
class _Call:
    """One call of a block, which can be repeated with other tensors in its holes.

    Attributes:
        function: runs the block.
        args: its positional arguments, with holes.
        kwargs: its keyword arguments, with holes.
        device: kind of device it runs on.
        autocast: the arguments of `torch.autocast` that hold during the call.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: dict[str, Any]

    @classmethod
    def of(cls, function: Callable[..., Any], args: tuple[Any, ...], device: str) -> tuple[_Call, list[Tensor]]:
        """The call with holes for what autograd keeps, and the tensors that belong there.

        These are the positional tensors, of which the first is the hidden state, and all that carry a tangent.
        """
        kwargs: dict[str, Any] = {}
        if isinstance(function, functools.partial):
            args, kwargs = (*function.args, *args), function.keywords
            function = function.func
        autocast = {
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        kept: list[Tensor] = []

        def emptied(x: Any) -> Any:
            kept.append(x)
            return _Hole()

        args = _map_leaves(args, emptied)
        kwargs = _map_leaves(kwargs, lambda x: emptied(x) if carries_tangent(x) else x)
        return cls(function, args, kwargs, device, autocast), kept

    def __call__(self, tensors: Iterable[Tensor]) -> Any:
        """Runs the block with `tensors` in the holes."""
        rest = iter(tensors)

        def filled(x: Any) -> Any:
            return next(rest) if isinstance(x, _Hole) else x

        with torch.autocast(self.device, **self.autocast):
            return self.function(*_map_leaves(self.args, filled), **_map_leaves(self.kwargs, filled))


def _map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """Applies `function` to tensors and holes, on copies of the containers; caches and the like stay themselves."""
    if isinstance(tree, (Tensor, _Hole)):
        return function(tree)
    if type(tree) in (tuple, list):
        return type(tree)(_map_leaves(value, function) for value in tree)
    if type(tree) is dict:
        return {name: _map_leaves(value, function) for name, value in tree.items()}
    return tree


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among a block's arguments or in its output, in order."""
    found: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        found.append(x)
        return x

    map_tensors(tree, collect)
    return found


@dataclass
class _Replay:
    """What the backward pass needs besides the primal inputs.

    Attributes:
        call: the block's call.
        outputs: which of its output tensors carried a tangent.
        trained: the parameters inside that train, all of them tangents; an anchor in their place where they are
            sharded, since engines take a parameter's gradient while it is whole, during the replay.
        mixes: the tangents of each carrier inside when it ran.
        direct: the parameters get their gradients from the replay's own graph.
    """

    call: _Call
    outputs: list[int]
    trained: list[nn.Parameter]
    mixes: list[tuple[TangentCarrier, Hashable | None]]
    direct: bool = False


def replay_block(block: nn.Module, strict: bool, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Takes the place of `torch.utils.checkpoint.checkpoint` while a linearized pass is open.

    Args:
        block: the module that is checkpointed.
        strict: refuse what can not be replayed, instead of recording it.
        function: runs it; called again in the backward pass.
        *args: its positional arguments.
        **options: what would tell torch how to record; nothing is recorded here.

    Returns:
        The block's output, dual; its tangents backpropagate by the replay.

    Raises:
        ValueError: if the block draws random numbers (dropout), which its replay would not repeat, hands tensors to
            other blocks past its output, or returns something in which no tangent is found.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    carriers = [module for module in block.modules() if isinstance(module, TangentCarrier)]
    trained = [p for carrier in carriers for p in carrier.tangent_parameters()]
    device = next((x.device.type for x in _tensors(args)), "cpu")
    call, inputs = _Call.of(function, args, device)
    primals, tangents = [split(x)[0] for x in inputs], [split(x)[1] for x in inputs]
    shared = _shared_state(call)
    if shared is not None and strict:
        raise ValueError(_SHARES.format(type(block).__name__, shared))
    if shared is not None or _primal_trains(block, len(trained), [*primals, *_tensors(call.kwargs)]):
        return function(*args)  # autograd has to record all of it
    if not trained and not any(t is not None and t.requires_grad for t in tangents):
        with torch.no_grad():  # below the first tangent that trains
            return function(*args)
    before = random_state(device)
    with torch.no_grad():
        output = function(*args)
    refuse_randomness(before, device, type(block).__name__)
    found = _tensors(output)
    outputs = [index for index, y in enumerate(found) if carries_tangent(y)]
    if not outputs:
        raise ValueError(_OPAQUE.format(type(block).__name__, type(output).__name__))
    direct = any(is_sharded(p) for p in trained)
    if direct:
        trained = [nn.Parameter(torch.zeros(()))]
    replay = _Replay(call, outputs, trained, [(carrier, carrier.tangent_mix()) for carrier in carriers], direct)
    given = [split(found[index])[1] for index in outputs]
    joined = _Replayed.apply(replay, len(outputs), *given, *primals, *tangents, *trained)
    connected = dict(zip((id(found[i]) for i in outputs), joined, strict=True))
    return map_tensors(output, lambda y: dual(split(y)[0], connected[id(y)]) if id(y) in connected else y)


_RECORD = (
    "Use `TangentConfig(gradient='recorded')` and switch gradient checkpointing off (`gradient_checkpointing=False`, "
    "`model.gradient_checkpointing_disable()`)."
)
_SHARES = "{} hands tensors to other blocks through a {}, past its output, which a replay would not see. " + _RECORD
_OPAQUE = "{} returns a {} in which no tangent is found, so its gradient would be lost in a replay. " + _RECORD
_CHANGED = (
    "The mix of axes, or its evaluation, changed between the forward pass ({}) and its backward pass ({}), which "
    "replays the block. Call `backward` before they change, inside the same `with model.linearized(...)` if any. "
    + _RECORD
)
_UNKNOWN = (
    "{} tangents of the replayed block are other parameters than in the forward pass: their gradients would be lost; "
    "something swapped them, such as `torch.func.functional_call`. " + _RECORD
)


def _shared_state(call: _Call) -> str | None:
    """The type of an argument in which blocks can leave tensors for one another, if there is one."""
    for value in (*call.args, *call.kwargs.values()):
        if isinstance(value, Cache) or (isinstance(value, Mapping) and type(value) is not dict):
            return type(value).__name__
    return None


def _primal_trains(block: nn.Module, tangents: int, inputs: list[Tensor]) -> bool:
    """Whether other parameters of the block train than its tangents, or something below it does."""
    others = sum(p.requires_grad for p in block.parameters()) > tangents
    return others or any(split(x)[0].requires_grad for x in inputs)


class _Replayed(torch.autograd.Function):
    """Identity on the tangents that a block gave; its backward is the block's own, at the primal input."""

    @staticmethod
    def forward(ctx: Any, replay: _Replay, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = (len(tensors) - count - len(replay.trained)) // 2
        ctx.replay, ctx.count, ctx.inputs = replay, count, inputs
        ctx.save_for_backward(*tensors[count : count + inputs])
        return tuple(tangent.view_as(tangent) for tangent in tensors[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        replay: _Replay = ctx.replay
        for carrier, mix in replay.mixes:
            if carrier.tangent_mix() != mix:
                raise RuntimeError(_CHANGED.format(mix, carrier.tangent_mix()))
        # What others do to saved tensors, such as moving them to the host, is not for tensors needed in a moment.
        with torch.enable_grad(), saved_tensors_hooks(_itself, _itself), replaying(replay.direct) as collected:
            primals = [
                x.detach().requires_grad_(need)
                for x, need in zip(ctx.saved_tensors, ctx.needs_input_grad[2 + ctx.count + ctx.inputs :], strict=False)
            ]
            output = _tensors(replay.call(primals))
            torch.autograd.backward([output[i] for i in replay.outputs], grads)  # `primals` are its only leaves
        strangers = len(collected.gradients.keys() - set(replay.trained))
        if strangers:
            raise RuntimeError(_UNKNOWN.format(strangers))
        unused = (None,) * (2 + ctx.count + ctx.inputs)
        return (*unused, *(x.grad for x in primals), *(collected.gradients.get(p) for p in replay.trained))


def _itself(x: Tensor) -> Tensor:
    return x


# ---- which blocks are replayed ---------------------------------------------------------------------------------------


def replay_blocks(opened: LinearizedPass, gradient: Gradient, strict: bool, options: Mapping[str, Any]) -> None:
    """Routes checkpointed blocks of `opened.root` to `replay_block` until the pass closes.

    Args:
        opened: the pass.
        gradient: `"auto"` replays the blocks for which gradient checkpointing is enabled, `"replay"` all of them.
        strict: refuse blocks that can not be replayed, instead of recording them.
        options: the keyword arguments of the model's call.

    Raises:
        ValueError: if what is asked for contradicts the checkpointing, or the model has no blocks to replay.
    """
    root = opened.root
    differentiated = torch.is_grad_enabled()
    wanted = gradient == "replay" and differentiated
    modules = opened.structure.modules
    enabled = {m for m in modules if vars(m).get("gradient_checkpointing", False)}
    replayed = [block for block in _replayable(modules) if wanted or block in enabled]
    if not replayed and (enabled or wanted):
        raise ValueError(
            f"{type(root).__name__} has no block that derives from transformers' GradientCheckpointingLayer: there is "
            f"nothing to replay. {_RECORD}"
        )
    if enabled and gradient == "recorded" and differentiated:
        raise ValueError(
            f"`gradient='recorded'` keeps the activations, but {type(root).__name__} has gradient checkpointing on. "
            "Use `TangentConfig(gradient='auto')`, or switch gradient checkpointing off."
        )
    asked = [name for name in ("output_attentions", "output_router_logits") if options.get(name)]
    if replayed and asked and differentiated:
        raise ValueError(f"`{asked[0]}=True` takes tensors out of the middle of blocks that are replayed. {_RECORD}")
    for block in replayed:
        _check_checkpointing(block)
        _set_until_close(opened, block, "_gradient_checkpointing_func", functools.partial(replay_block, block, strict))
        _set_until_close(opened, block, "gradient_checkpointing", True)


def replayable_blocks(root: nn.Module) -> list[nn.Module]:
    """The blocks that can be replayed: those that transformers can checkpoint."""
    return _replayable(root.modules())


def _replayable(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for module in modules if isinstance(module, GradientCheckpointingLayer)]


def _check_checkpointing(block: nn.Module) -> None:
    """Refuses a checkpointing that does more than torch's: what it adds would be lost."""
    chosen = vars(block).get("_gradient_checkpointing_func")
    plain = chosen.func if isinstance(chosen, functools.partial) else chosen
    if plain is not None and plain is not checkpoint and vars(block).get("gradient_checkpointing", False):
        raise ValueError(
            f"{type(block).__name__} is checkpointed by {plain!r} instead of torch.utils.checkpoint; a linearized "
            "model replays its blocks itself and would drop what that adds. Enable plain checkpointing, "
            "`model.gradient_checkpointing_enable()`; to offload activations use `activation_offloading=True` in the "
            "training arguments or `torch.autograd.graph.save_on_cpu()`."
        )


def _set_until_close(opened: LinearizedPass, module: nn.Module, name: str, value: Any) -> None:
    own = vars(module)
    if name in own:
        opened.contexts.callback(setattr, module, name, own[name])
    else:
        opened.contexts.callback(delattr, module, name)
    setattr(module, name, value)
