"""The modules below a root, and those of a kind among them: found once, and again only after the tree has changed.

A decoding step is short: to look through a thousand modules for each of the things that a pass prepares takes as long
as some of its layers. So the tree is walked once per pass, to see whether it is still the same, and what was found in
it is kept. This file does not know what is looked for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import nn


class Structure:
    """The modules of a tree.

    Attributes:
        modules: all of them, in the order of `root.modules()`.
        kinds: their classes, which an engine may exchange in place (FSDP2).
        configs: what each of them keeps as its `config`, or `None`.
        homes: names of the files that define their classes.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        self.modules = modules
        self.kinds, self.configs = _kinds(modules), _configs(modules)
        self.homes = frozenset(kind.__module__ for kind in self.kinds)
        self._found: dict[Callable[[nn.Module], bool], list[nn.Module]] = {}

    @staticmethod
    def of(root: nn.Module, known: Structure | None = None) -> Structure:
        """The structure of `root`: `known`, with what was found in it, if that still holds."""
        modules = _walk(root)
        return known if known is not None and known._holds(modules) else Structure(modules)

    def _holds(self, modules: list[nn.Module]) -> bool:
        same = modules == self.modules and _kinds(modules) == self.kinds
        return same and all(map(operator.is_, _configs(modules), self.configs))

    def select(self, belongs: Callable[[nn.Module], bool]) -> list[Any]:
        """The modules for which `belongs` is true; it is asked once.

        Args:
            belongs: a function with a name, whose answer depends on the class of a module, on its config, and on
                what the module is built with: on nothing that changes afterwards.
        """
        if belongs not in self._found:
            self._found[belongs] = [module for module in self.modules if belongs(module)]
        return self._found[belongs]


def _walk(root: nn.Module) -> list[nn.Module]:
    """As `list(root.modules())`, in a tenth of the time."""
    found: dict[nn.Module, None] = {}
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is not None and module not in found:
            found[module] = None
            waiting.extend(reversed(module._modules.values()))
    return list(found)


def _kinds(modules: list[nn.Module]) -> list[type[nn.Module]]:
    return list(map(type, modules))


def _configs(modules: list[nn.Module]) -> list[Any]:
    return [vars(module).get("config") for module in modules]
