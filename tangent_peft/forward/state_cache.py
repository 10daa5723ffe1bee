"""Convolutional and recurrent states in a cache (Mamba, gated delta rule, LFM2) that keep their tangents between steps.

A model reads such a state, changes it in place and writes it back, all inside one forward. So for the time of a pass
the cache holds dual states, and between two passes ordinary tensors, packed along dimension 1 as keys and values are:

    [state ; dstate]  --first read in a pass-->  dual(state, dstate)  --the pass closes-->  [state ; dstate]

Dimension 1 is that of the channels or heads: (B, C, L) for convolutions, (B, C or H, …) for recurrences. What
transformers does to a state between two steps (beam reordering, selecting, resetting, cropping the last dimension)
leaves it alone.

Seam: `Cache.get_conv_state`, `get_recurrent_state` and the two updates, wrapped once at import; every model of
transformers reads and writes its states through these.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from tangent_peft.forward.level import LinearizedPass, current_pass, dual, split


_KINDS = ("conv_states", "recurrent_states")
_FLAGS = ("is_conv_states_initialized", "is_recurrent_states_initialized")
_PACKED = "tangent_states"  # of a layer: the (kind, index) of its states that are stored as [primal ; tangent]
_OPEN = "tangent_open"  # of a layer: its states are dual, a pass is running


def holds_open_states(layer: Any) -> bool:
    """Whether the states of this cache layer are dual now and will be packed as the pass closes."""
    return bool(vars(layer).get(_OPEN, False))


def has_states(layer: Any) -> bool:
    """Whether this cache layer holds states of an earlier forward."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())


def _make_room(layer: LinearAttentionCacheLayerMixin) -> None:
    """Emptied buffers that were packed are allocated anew: they have twice the channels."""
    packed: set[tuple[str, int]] = vars(layer).get(_PACKED, set())
    for kind, index in [entry for entry in packed if not layer.has_previous_state[entry[1]]]:
        vars(layer)[_FLAGS[_KINDS.index(kind)]][index] = False
        packed.discard((kind, index))


def _open(layer: LinearAttentionCacheLayerMixin, opened: LinearizedPass) -> None:
    """Makes the states dual until the pass closes; copies, since models change them in place."""
    packed: set[tuple[str, int]] = vars(layer).setdefault(_PACKED, set())
    vars(layer)[_OPEN] = True
    opened.contexts.callback(_close, layer)  # before the dual level that the pass entered first
    for kind in _KINDS:
        states = vars(layer)[kind]
        for index, stored in states.items():
            if (kind, index) in packed:
                primal, tangent = stored.chunk(2, dim=1)
                states[index] = dual(primal.detach().clone(), tangent.clone())
            elif isinstance(stored, Tensor) and stored.is_inference():
                states[index] = stored.clone()


def _close(layer: LinearAttentionCacheLayerMixin) -> None:
    packed: set[tuple[str, int]] = vars(layer)[_PACKED]
    packed.clear()
    for kind in _KINDS:
        states = vars(layer)[kind]
        for index, state in states.items():
            if not isinstance(state, Tensor):
                continue
            primal, tangent = split(state)
            if tangent is not None:
                states[index] = torch.cat([primal, tangent], dim=1)
                packed.add((kind, index))
    del vars(layer)[_OPEN]


def wrap_state_access(original: Any, check_stamp: Any, stamped: Any) -> Any:
    """A method of `Cache` that reads or writes a state, which makes the layer's states dual before.

    Args:
        original: the method; `layer_idx` is its argument.
        check_stamp: refuses a cache that another mix filled, by cache and layer index.
        stamped: whether a cache was ever filled by a linearized pass.
    """
    takes_states = original.__name__.startswith("update")

    @functools.wraps(original)
    def access(self: Cache, *args: Any, **kwargs: Any) -> Any:
        running = current_pass()
        if running is None and not stamped(self):
            return original(self, *args, **kwargs)
        layer_idx = kwargs.get("layer_idx", args[takes_states] if len(args) > takes_states else None)
        if layer_idx is None:
            raise TypeError(f"{original.__name__}() was called without layer_idx")
        layer = self.layers[layer_idx]
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            check_stamp(self, layer_idx)
            _make_room(layer)
            if running is not None and not holds_open_states(layer):
                _open(layer, running)
        return original(self, *args, **kwargs)

    return access
