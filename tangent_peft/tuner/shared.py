"""Layers that share one weight, which can not have a tangent each: refused."""

from __future__ import annotations

from collections.abc import Iterable

from tangent_peft.tuner.layer import TangentLayer


def refuse_shared_weights(layers: Iterable[TangentLayer], root: str) -> None:
    """Refuses two wrapped layers with one and the same weight: each would train a tangent of its own for it.

    Args:
        layers: the wrapped layers of a model.
        root: the name of its class.

    Raises:
        NotImplementedError: naming both, and how to leave them out.
    """
    owners: dict[int, TangentLayer] = {}
    for layer in layers:
        weight = dict(layer.get_base_layer().named_parameters(recurse=False)).get("weight")
        other = layer if weight is None else owners.setdefault(id(weight), layer)
        if other is not layer and type(other) is type(layer):  # not the embedding that a head is tied to
            raise NotImplementedError(
                f"{root} can not be linearized exactly: layers {other.layer_name!r} and {layer.layer_name!r} share one "
                "weight, and a tangent at each would be two tangents of it. Leave such layers out with "
                f"`exclude_modules=['{layer.layer_name.rsplit('.', 1)[-1]}', ...]` in TangentConfig."
            )
