"""Where a module stands in a model: its block and its kind, the rows and columns of heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar


@dataclass(frozen=True)
class Place:
    """A module by where it stands.

    Attributes:
        name: its full name; of fused experts with the expert's number in brackets.
        kind: what it is in its block, such as `self_attn.q_proj`; the name of one that is in no block.
        block: number of the block; `None` outside of blocks, as of the head.
    """

    name: str
    kind: str
    block: int | None


class Placed(Protocol):
    """What belongs to a module."""

    @property
    def place(self) -> Place:
        """The module."""


Cells: TypeAlias = dict[tuple[str, int | None], float]  # a number by kind and block
P = TypeVar("P", bound=Placed)


def place_of(name: str, expert: int | None = None, several: bool = False) -> Place:
    """The place of a module, by its name in the unmodified model: the first number in it is the block's.

    Args:
        name: such as `model.layers.3.self_attn.q_proj`.
        expert: number of one of several fused experts.
        several: whether the model has several stacks of blocks, as with vision; the kind then begins with the stack.
    """
    full, stack = name if expert is None else f"{name}[{expert}]", stack_of(name)
    if stack is None:
        return Place(full, name, None)
    block, _, kind = name[len(stack) + 1 :].partition(".")
    kind = kind or stack
    return Place(full, f"{stack}: {kind}" if several else kind, int(block))


def stack_of(name: str) -> str | None:
    """What comes before the block's number in a module's name; `None` outside of blocks."""
    parts = name.split(".")
    block = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return None if block is None else ".".join(parts[:block])


def grouped(items: Sequence[P]) -> dict[tuple[str, int | None], list[P]]:
    """What belongs to the modules of one kind in one block, several for experts."""
    found: dict[tuple[str, int | None], list[P]] = {}
    for item in items:
        found.setdefault((item.place.kind, item.place.block), []).append(item)
    return found
