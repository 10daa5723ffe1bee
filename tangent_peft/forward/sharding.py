"""Weights that an engine shards: whole inside their module's own call, in pieces or empty outside of it.

DeepSpeed ZeRO-3 leaves an empty tensor in the parameter's place, FSDP2 a `DTensor`; both gather the whole by the hooks
of the module that holds it. Code that reads a weight without calling its module therefore runs inside such a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether an engine keeps only a piece of this parameter here, gathered or not at this moment."""
    return isinstance(parameter, DTensor) or "ds_id" in vars(parameter)


def call_within(modules: Iterable[nn.Module], function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, from inside calls of those `modules` whose own weights are sharded.

    Args:
        modules: those whose weights `function` reads.
        function: gets the tensors among `args` as the modules' hooks give them on; its output passes their hooks, so
            that the weights are whole again in its backward pass.
        *args: its arguments.
    """
    inner = function
    for module in modules:
        if any(is_sharded(p) for p in module.parameters(recurse=False)):
            inner = _Through(module, inner)
    return inner(*args)


class _Through:
    """A function that runs in the place of a module's `forward`, between the module's hooks."""

    def __init__(self, module: nn.Module, function: Callable[..., Any]) -> None:
        self.module, self.function = module, function

    def __call__(self, *args: Any) -> Any:
        own = vars(self.module)
        kept = own.get("forward")
        own["forward"] = self.function
        try:
            return self.module(*args)
        finally:
            if kept is None:
                del own["forward"]
            else:
                own["forward"] = kept
