"""One linearized pass and the two words everything else uses: `split` a dual tensor, `join` primal and tangent.

PyTorch's dual level is process-global, so is the pass: there is at most one, it belongs to the thread that opened it,
and another thread waits for its turn. This file holds its state and knows no model; `dual.py` opens and closes it
around a model's forward.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tangent_peft.forward.structure import Structure


TURN_TIMEOUT_S = 600.0  # a thread that waits longer for another's pass waits for a thread that waits for it
_POLL_S = 0.05  # how often a waiting thread looks whether the pass it waits for was interrupted


@dataclass
class LinearizedPass:
    """What is known while a linearized forward runs.

    Attributes:
        root: the module whose call opened the pass.
        mix: identity of the tangents of this pass; equal mixes may share a key/value cache.
        structure: the modules of `root`, found once for all who look through them.
        primal_attention: the attention implementation the user chose, by `id` of the model config that names it.
        hidden: primal and tangent (B, T, D) of the backbone's last hidden state, if the tangent ended there.
        random_state: state of the random generator when a training forward began, which must draw nothing.
        depth: how often the root is inside its own forward.
        contexts: what is undone, in reverse order, when the pass closes; valid for the whole process.
        modes: the same for PyTorch's modes, which are those of `thread`.
        caller: the frame of the call that the pass belongs to.
        thread: the thread that runs it.
    """

    root: nn.Module
    mix: Hashable
    structure: Structure
    primal_attention: dict[int, str] = field(default_factory=dict)
    hidden: tuple[Tensor, Tensor | None] | None = None
    random_state: Tensor | None = None
    depth: int = 0
    contexts: ExitStack = field(default_factory=ExitStack)
    modes: ExitStack = field(default_factory=ExitStack)
    caller: FrameType | None = None
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def is_running(self) -> bool:
        """Whether the call that opened the pass has not ended yet."""
        frame: FrameType | None = sys._getframe()
        if self.thread is not threading.current_thread():
            if not self.thread.is_alive() or self.thread.ident is None:
                return False
            frame = sys._current_frames().get(self.thread.ident)
        while frame is not None and frame is not self.caller:
            frame = frame.f_back
        return frame is not None


_ZERO = torch.zeros(())
_open_pass: LinearizedPass | None = None
_turn = threading.Condition()  # held while `_open_pass` changes, notified when a pass closes
_abandoned: list[ExitStack] = []  # modes that an exception has undone already: even dropping them would undo them again


def current_pass() -> LinearizedPass | None:
    """The linearized pass that runs in this thread, or `None`."""
    opened = _open_pass
    return opened if opened is not None and opened.thread is threading.current_thread() else None


def close_interrupted_pass() -> None:
    """Closes a pass whose forward was left by an exception that PyTorch's hooks do not see: an interrupt (Ctrl-C)."""
    if _open_pass is None:
        return
    with _turn:
        opened = _open_pass
        if opened is not None and not opened.is_running():
            _abandoned.append(opened.modes.pop_all())
            close_pass(opened)


def _await_turn(root: nn.Module) -> None:
    """Waits, with `_turn` held, until no other thread has a pass open."""
    deadline = time.monotonic() + TURN_TIMEOUT_S
    while _open_pass is not None and _open_pass.thread is not threading.current_thread():
        if time.monotonic() > deadline:
            raise RuntimeError(
                f"Thread {threading.current_thread().name!r} calls the linearized {type(root).__name__} while thread "
                f"{_open_pass.thread.name!r} runs a linearized forward of {type(_open_pass.root).__name__}, and waited "
                f"{TURN_TIMEOUT_S:g} s for its end; PyTorch has one dual level per process. Do not let a forward wait "
                "for another thread that calls a linearized model, or serve the models from separate processes."
            )
        _turn.wait(_POLL_S)
        close_interrupted_pass()


def open_pass(
    root: nn.Module, mix: Hashable, caller: FrameType | None = None, structure: Structure | None = None
) -> LinearizedPass:
    """Enters a dual level for a forward of `root`, once no other thread has one open.

    Args:
        root: the module whose call is the pass.
        mix: identity of its tangents.
        caller: the frame of that call; the caller of this function by default.
        structure: the modules of `root`; found anew by default.

    Raises:
        RuntimeError: if a dual level is open already; PyTorch does not nest them.
    """
    global _open_pass
    opened = LinearizedPass(root, mix, structure or Structure.of(root), caller=caller or sys._getframe(1))
    with _turn:
        _await_turn(root)
        if _open_pass is not None:
            raise RuntimeError(
                f"A linearized forward of {type(_open_pass.root).__name__} is running and calls {type(root).__name__}, "
                "which carries tangents as well; PyTorch does not nest dual levels. Run one of the two with "
                "`model.linearized(False)`, or outside the other."
            )
        try:
            _enter(opened)
        except BaseException:
            opened.contexts.close()
            opened.modes.close()
            raise
        _open_pass = opened
    return opened


def refuse_compilation(root: nn.Module) -> None:
    """Raises if the calling code is being compiled: the graph would be the base model's, without a word.

    Raises:
        RuntimeError: from outside of the trace, where it would only end the compilation of a frame.
    """
    if torch.compiler.is_compiling():
        _raise_compiled(root)


@torch.compiler.disable
def _raise_compiled(root: nn.Module) -> None:
    raise RuntimeError(
        f"{type(root).__name__} is linearized and was called from compiled code (torch.compile), which drops tangents: "
        "the result would be the base model's. Call the model itself, pass `disable_compile=True` to `generate`, or "
        "compile the merged mix (`model.linearized(False)`, `merge_and_unload()`)."
    )


def _run_as_written(opened: LinearizedPass) -> None:
    """Makes compiled parts of the model run as they are written until the pass closes."""
    refuse_compilation(opened.root)
    try:
        opened.contexts.enter_context(torch.compiler.set_stance("force_eager"))
    except RuntimeError:  # called by a frame that is not compiled itself, but what it calls is
        _raise_compiled(opened.root)


def _enter(opened: LinearizedPass) -> None:
    _run_as_written(opened)
    if torch.is_inference_mode_enabled():
        # `inference_mode` drops tangents without a word (the tangent of any dual made in it is None).
        opened.modes.enter_context(torch.inference_mode(False))
        opened.modes.enter_context(torch.no_grad())
    try:
        opened.contexts.enter_context(forward_ad.dual_level())
        forward_ad.make_dual(_ZERO, _ZERO)  # loads the derivatives that torch has in Python
    except RuntimeError as error:
        raise RuntimeError(
            f"{type(opened.root).__name__} is linearized, so its forward opens a level of torch.autograd.forward_ad, "
            "but one is open already. Leave the surrounding `forward_ad.dual_level()` (or `torch.func.jvp`), or use "
            "`model.linearized(False)` inside it."
        ) from error


def close_pass(opened: LinearizedPass) -> None:
    """Leaves the dual level; whatever is still dual loses its tangent, so join first."""
    global _open_pass
    with _turn:
        _open_pass = None
        try:
            opened.contexts.close()
        finally:
            opened.modes.close()
            _turn.notify_all()


# What `forward_ad.unpack_dual` and `make_dual` call, after imports and look-ups that take several times as long. A
# decoding step calls them hundreds of times.
_LEVEL = 0  # PyTorch does not nest dual levels


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Primal and tangent of `x`; the tangent is `None` where `x` carries none."""
    if forward_ad._current_level < 0:
        return x, None
    primal, tangent = torch._unpack_dual(x, level=_LEVEL)
    return primal, tangent


def dual(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The dual tensor of `primal` and `tangent`, which takes the primal's dtype; the primal itself for `None`."""
    if tangent is None:
        return primal
    return torch._make_dual(primal, tangent.to(primal.dtype), level=_LEVEL)


def join(x: Tensor) -> Tensor:
    """Primal + tangent: the value of the linearized quantity, an ordinary tensor."""
    primal, tangent = split(x)
    return primal if tangent is None else primal + tangent


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast that is on now, or `None`."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


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
