"""Training or evaluation mode for the duration of a block, module by module.

`model.train(model.training)` would switch on what somebody holds in eval mode inside a model that trains: a frozen
dropout, a batch norm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn


@contextmanager
def mode(modules: Iterable[nn.Module], training: bool) -> Iterator[None]:
    """Puts these modules, and none inside of them that is not given, in a mode; each has its own again afterwards."""
    before = [(module, module.training) for module in modules]
    try:
        for module, _ in before:
            module.training = training
        yield
    finally:
        for module, was in before:
            module.training = was


def evaluating(model: nn.Module) -> AbstractContextManager[None]:
    """Eval mode for a model and all that is in it."""
    return mode(model.modules(), training=False)
