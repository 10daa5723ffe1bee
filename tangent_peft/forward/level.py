"""One linearized pass and the two words everything else uses: `split` a dual tensor, `join` primal and tangent.

PyTorch's dual level is process-global, so is the pass: there is at most one. This file holds its state and knows no
model; `dual.py` opens and closes it around a model's forward.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


@dataclass
class LinearizedPass:
    """What is known while a linearized forward runs.

    Attributes:
        root: the module whose call opened the pass.
        mix: identity of the tangents of this pass; equal mixes may share a key/value cache.
        primal_attention: the attention implementation the user chose, by `id` of the model config that names it.
        hidden: primal and tangent (B, T, D) of the backbone's last hidden state, if the tangent ended there.
        depth: how often the root is inside its own forward.
        contexts: what is undone, in reverse order, when the pass closes.
        caller: the frame of the call that the pass belongs to.
        thread: the thread that runs it.
    """

    root: nn.Module
    mix: Hashable
    primal_attention: dict[int, str] = field(default_factory=dict)
    hidden: tuple[Tensor, Tensor | None] | None = None
    depth: int = 0
    contexts: ExitStack = field(default_factory=ExitStack)
    caller: FrameType | None = None
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def is_running(self) -> bool:
        """Whether the call that opened the pass has not ended yet."""
        if self.thread is not threading.current_thread():
            return self.thread.is_alive()
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


_open_pass: LinearizedPass | None = None


def current_pass() -> LinearizedPass | None:
    """The linearized pass that is running, or `None`."""
    return _open_pass


def close_interrupted_pass() -> None:
    """Closes a pass whose forward was left by an exception that PyTorch's hooks do not see: an interrupt (Ctrl-C)."""
    if _open_pass is not None and not _open_pass.is_running():
        close_pass(_open_pass)


def open_pass(root: nn.Module, mix: Hashable, caller: FrameType | None = None) -> LinearizedPass:
    """Enters a dual level for a forward of `root`.

    Args:
        root: the module whose call is the pass.
        mix: identity of its tangents.
        caller: the frame of that call; the caller of this function by default.

    Raises:
        RuntimeError: if a dual level is open already; PyTorch does not nest them.
    """
    global _open_pass
    if _open_pass is not None:
        raise RuntimeError(
            f"A linearized forward of {type(_open_pass.root).__name__} is running and calls {type(root).__name__}, "
            "which carries tangents as well; PyTorch does not nest dual levels. Run one of the two with "
            "`model.linearized(False)`, or outside the other."
        )
    opened = LinearizedPass(root, mix, caller=caller or sys._getframe(1))
    if torch.is_inference_mode_enabled():
        # `inference_mode` drops tangents without a word (the tangent of any dual made in it is None).
        opened.contexts.enter_context(torch.inference_mode(False))
        opened.contexts.enter_context(torch.no_grad())
    try:
        opened.contexts.enter_context(forward_ad.dual_level())
    except RuntimeError as error:
        opened.contexts.close()
        raise RuntimeError(
            f"{type(root).__name__} is linearized, so its forward opens a level of torch.autograd.forward_ad, but one "
            "is open already. Leave the surrounding `forward_ad.dual_level()` (or `torch.func.jvp`), or use "
            "`model.linearized(False)` inside it."
        ) from error
    _open_pass = opened
    return opened


def close_pass(opened: LinearizedPass) -> None:
    """Leaves the dual level; whatever is still dual loses its tangent, so join first."""
    global _open_pass
    _open_pass = None
    opened.contexts.close()


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of `x`; the tangent is `None` where `x` carries none."""
    primal, tangent = forward_ad.unpack_dual(x)
    return primal, tangent


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor of `primal` and `tangent`, which takes the primal's dtype; the primal itself for `None`."""
    if tangent is None:
        return primal
    return forward_ad.make_dual(primal, tangent.to(primal.dtype))


def join(x: Tensor) -> Tensor:
    """Primal + tangent: the value of the linearized quantity, an ordinary tensor."""
    primal, tangent = split(x)
    return primal if tangent is None else primal + tangent


def carries_tangent(x: Any) -> bool:
    """Whether `x` is a tensor that carries a tangent."""
    return isinstance(x, Tensor) and split(x)[1] is not None


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies `function` to every tensor in nested tuples, lists, dicts and `ModelOutput`s; the rest stays itself."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, dict):
        # ModelOutput is a dict whose keys are also attributes: item assignment keeps both.
        for key in list(tree):
            mapped = map_tensors(tree[key], function)
            if mapped is not tree[key]:
                tree[key] = mapped
        return tree
    if (isinstance(tree, tuple) and type(tree) is tuple) or isinstance(tree, list):
        return type(tree)(map_tensors(value, function) for value in tree)
    if isinstance(tree, tuple) and type(tree).__module__ == "torch.return_types":  # of torch.max and its like
        return type(tree)([map_tensors(value, function) for value in tree])
    if isinstance(tree, tuple):  # a named tuple
        return type(tree)(*(map_tensors(value, function) for value in tree))
    return tree
