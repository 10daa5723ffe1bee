"""A control for an axis: the same τ, writing in random directions.

In every module the rows of ΔW, which are the outputs, change places and signs at random. What the axis reads, its norm
and its singular values stay exactly as they are, in every module; only where it writes is left to chance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from tangent_peft.forward import is_sharded
from tangent_peft.tuner.axes import tangent_layers
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.weights import leaf_weight


@contextmanager
def scrambled(model: nn.Module, axis: str, seed: int) -> Iterator[None]:
    """Makes an axis its own control for a `with` block; afterwards it is bit for bit what it was.

    The block must not train, save or export the axis. It holds a second copy of the axis's B, or of a dense ΔW.

    Args:
        model: the wrapped model.
        axis: name of the axis.
        seed: of the places and signs.

    Raises:
        ValueError: if an engine shards the tangents over processes.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in tangent_layers(model) if axis in layer.tangent_r]
    held: list[tuple[nn.Parameter, torch.Tensor]] = []
    try:
        for layer in layers:
            parameter = _writing(layer, axis)
            if is_sharded(parameter):
                raise ValueError(
                    f"The tangents of {axis!r} are sharded over processes, so their outputs can not change places. Ask "
                    "for no controls."
                )
            rows = parameter.shape[-2]
            order = torch.randperm(rows, generator=generator).to(parameter.device)
            signs = (torch.randint(2, (rows, 1), generator=generator) * 2 - 1).to(parameter)
            held.append((parameter, parameter.data))
            parameter.data = parameter.data[..., order, :] * signs
        yield
    finally:
        for parameter, before in held:
            parameter.data = before


def _writing(layer: TangentLayer, axis: str) -> nn.Parameter:
    """The factor of ΔW whose rows are the outputs: ΔW itself, or B."""
    return leaf_weight(layer.tangent_delta if layer.tangent_r[axis] is None else layer.tangent_B, axis)
