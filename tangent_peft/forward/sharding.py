"""Weights that an engine shards: whole inside their module's own call, in pieces or empty outside of it.

DeepSpeed ZeRO-3 leaves an empty tensor in the parameter's place, FSDP2 a `DTensor`; both gather the whole by the hooks
of the module that holds it. Code that reads a weight without calling its module therefore runs inside such a call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_sharded(parameter: Tensor) -> bool:
    """Whether an engine keeps only a piece of this parameter here, gathered or not at this moment."""
    return isinstance(parameter, DTensor) or "ds_id" in vars(parameter)


def has_zero3_hooks(module: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 gave this module its hooks, with two Functions of their own."""
    return "pre_bwd_fn" in vars(module)


def full_shape(parameter: Tensor) -> torch.Size:
    """The shape of the whole parameter."""
    return vars(parameter).get("ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Makes parameters that ZeRO-3 partitions whole in the `with` block, which all processes must enter together."""
    absent = [p for p in parameters if "ds_status" in vars(p) and vars(p)["ds_status"].name == "NOT_AVAILABLE"]
    if not absent:
        yield
        return
    with vars(sys.modules["deepspeed.runtime.zero"])["GatheredParameters"](absent):
        yield


def whole(x: Tensor) -> Tensor:
    """A `DTensor` in full, gathered from all processes, which must call this together; another tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def is_fsdp_module(module: nn.Module) -> bool:
    """Whether FSDP2 shards this module as a unit: it then gave it another class."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, vars(fsdp)["FSDPModule"])


def fsdp_modules(modules: Iterable[nn.Module]) -> list[Any]:
    """The modules that FSDP2 shards as units; none as long as nobody has imported it."""
    return [module for module in modules if is_fsdp_module(module)]


def leaf_that_gets_gradients(root: nn.Module) -> Callable[[nn.Parameter], nn.Parameter]:
    """From a parameter of `root` to the one that autograd gives its gradient to, an FSDP2 unit's unsharded parameter.

    Valid once the model has run a forward pass.
    """
    units = [module._get_fsdp_state() for module in fsdp_modules(root.modules())]
    known = [p for unit in units for group in unit._fsdp_param_groups for p in group.fsdp_params]
    unsharded = {p.sharded_param: p._unsharded_param for p in known}

    def leaf(parameter: nn.Parameter) -> nn.Parameter:
        # Whether it trains is copied as the unit gathers, which may be yet to come.
        return unsharded.get(parameter, parameter).requires_grad_(parameter.requires_grad)

    return leaf


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
