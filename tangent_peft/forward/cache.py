"""Key/value caches that keep their tangents from one decoding step to the next.

A dual level ends with its forward, and cached keys and values would lose their tangents there: the next step would run
the base model on the prefix, silently. So a cache stores ordinary tensors only: along the head dimension, first the
primal heads, then the tangent heads,

    keys_BKSE  --store-->  packed_B(2K)SE = [keys ; dkeys]  --read in the next level-->  dual(keys, dkeys).

Every operation transformers performs on a cache between two steps (beam reordering, cropping, repeating, selecting,
static allocation) leaves that dimension alone, so all of them work unchanged, in any decoding loop.

Cross-attention stores its keys once and afterwards reads them from the layer, past `update`; `reveal_cross_attention`
shows them as dual tensors while a pass is open. Convolutional and recurrent states are kept by `state_cache.py`.
Whatever a model keeps in a cache by a way of its own would still lose its tangents: `refuse_lost_tangents` looks for
them before the pass closes.

Seam: `transformers.cache_utils.Cache.update` and its linear-attention siblings, wrapped once at import.
Letters: B batch, K key/value heads, S keys, E head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
)

from tangent_peft.forward.level import LinearizedPass, carries_tangent, current_pass, dual, split
from tangent_peft.forward.state_cache import has_states, holds_open_states, wrap_state_access


_STAMP = "tangent_mix"
_PACKED = "tangent_packed"  # of a cache layer: whether what it stores is [primal ; tangent]
_STATES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")  # outputs the next step reads


def pack(primal_BKSE: Tensor, tangent_BKSE: Tensor | None) -> Tensor:
    """[primal ; tangent] along the heads: shape (B, 2K, S, E)."""
    tangent_BKSE = torch.zeros_like(primal_BKSE) if tangent_BKSE is None else tangent_BKSE
    return torch.cat([primal_BKSE, tangent_BKSE], dim=1)


def unpack(packed: Tensor, primal_trains: bool) -> Tensor:
    """The dual tensor of shape (B, K, S, E) that `pack` stored.

    Packing ties the primal to the graph of the tangent beside it; unless it has a graph of its own it is cut off again.
    """
    primal, tangent = packed.chunk(2, dim=1)
    return dual(primal if primal_trains else primal.detach(), tangent)


def _check_stamp(cache: Cache, layer_idx: int) -> None:
    """Refuses a cache whose content was computed under another mix than the pass that now reads it."""
    running = current_pass()
    now = None if running is None else running.mix
    stamp = vars(cache).get(_STAMP)
    if stamp == now:
        return
    if _is_empty(cache, layer_idx):
        vars(cache)[_STAMP] = now
        return
    filled, reads = (_describe(mix) for mix in (stamp, now))
    raise ValueError(
        f"The key/value cache ({type(cache).__name__}) was filled by {filled} and is now read by {reads}: the cached "
        "prefix has other tangents, or none, and the result would belong to neither. Start with an empty cache after "
        "changing the axis weights, enabling or disabling axes, or switching `linearized(...)`."
    )


def _is_empty(cache: Cache, layer_idx: int) -> bool:
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if has_states(layer):
        return False
    return not isinstance(layer, CacheLayerMixin) or int(layer.get_seq_length()) == 0


def _describe(mix: Any) -> str:
    return "the model without a linearized axis" if mix is None else f"the linearized mix {mix}"


def _normal_storage(cache: Cache, layer_idx: int) -> None:
    """Static buffers allocated under `inference_mode` can not be written in a pass, which runs outside of it."""
    if layer_idx >= len(cache.layers):
        return
    state = vars(cache.layers[layer_idx])
    for name, value in state.items():
        if isinstance(value, Tensor) and value.is_inference():
            state[name] = value.clone()


def _make_room(cache: Cache, layer_idx: int, key_states: Tensor) -> None:
    """An emptied static buffer is allocated anew where it has another number of heads: packed before and now not."""
    layer = cache.layers[layer_idx] if layer_idx < len(cache.layers) else None
    if not isinstance(layer, StaticLayer) or not layer.is_initialized or layer.keys is None:
        return
    if layer.keys.shape[1] != key_states.shape[1] and int(layer.get_seq_length()) == 0:
        layer.is_initialized = False


def reveal_cross_attention(opened: LinearizedPass, cache: Any) -> None:
    """Replaces the packed keys and values of an encoder's output by dual ones until the pass closes."""
    found = _crossed(opened.root, cache)
    if found is None:
        return
    crossed, indices = found
    layer: Any  # of the kind that has keys and values: attention's
    for layer_idx in indices:
        if layer_idx >= len(crossed.layers) or int(crossed.get_seq_length(layer_idx)) == 0:
            continue
        layer = crossed.layers[layer_idx]
        _check_stamp(crossed, layer_idx)
        _normal_storage(crossed, layer_idx)
        if vars(layer)[_PACKED]:
            opened.contexts.callback(vars(layer).update, keys=layer.keys, values=layer.values)
            layer.keys, layer.values = unpack(layer.keys, False), unpack(layer.values, False)


def _crossed(root: nn.Module, cache: Any) -> tuple[Cache, Iterable[int]] | None:
    """The cache in which cross-attention keeps its keys, and the indices of its layers there."""
    if isinstance(cache, EncoderDecoderCache):
        return cache.cross_attention_cache, range(len(cache.cross_attention_cache.layers))
    if not isinstance(cache, Cache) or not isinstance(root, PreTrainedModel):
        return None
    config = vars(root.config.get_text_config())  # Mllama keeps an image's keys between those of the text
    return cache, config.get("cross_attention_layers") or ()


def refuse_lost_tangents(args: Any, kwargs: Any, output: Any) -> None:
    """Refuses the result of a forward that left a tangent in a cache, where it ends with the pass.

    Args:
        args: positional arguments of the forward; a cache may be among them.
        kwargs: keyword arguments of the forward.
        output: what it returns, not yet joined.

    Raises:
        NotImplementedError: if a cache still carries a tangent.
    """
    for held in _caches(args, kwargs, output):
        if _holds_tangent(held):
            raise NotImplementedError(
                f"{type(held).__name__} keeps states from one decoding step to the next that carry a tangent, which "
                "ends with this forward: the next step would read the base model's states. Generate with "
                "`use_cache=False`, or merge the mix first (`model.linearized(False)`)."
            )


def _caches(args: Any, kwargs: Any, output: Any) -> list[Any]:
    returned = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
    found = {id(value): value for value in (*args, *kwargs.values(), *returned) if _is_cache(value)}
    if isinstance(output, dict):
        found |= {id(output[name]): output[name] for name in _STATES if output.get(name) is not None}
    return list(found.values())


def _is_cache(value: Any) -> bool:
    kind: Any = type(value)
    return _is_cache_kind(kind)


@functools.cache
def _is_cache_kind(kind: type) -> bool:
    """Whether `kind` is of a cache or one of its layers; a model's own kinds are only known by their name."""
    known = (Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return issubclass(kind, known) or kind.__name__.endswith(("Cache", "CacheLayer"))


def _holds_tangent(held: Any) -> bool:
    if isinstance(held, Tensor):
        return carries_tangent(held)
    if isinstance(held, (list, tuple)):
        return any(map(_holds_tangent, held))
    if isinstance(held, dict):
        return any(map(_holds_tangent, held.values()))
    if not _is_cache(held):
        return False
    state = vars(held)
    packed = ["keys", "values"] if _PACKED in state else []  # `update` stored them, or they are only revealed
    packed += ["conv_states", "recurrent_states"] if holds_open_states(held) else []
    return any(_holds_tangent(value) for name, value in state.items() if name not in packed)


def _wrap_update(original: Any) -> Any:
    @functools.wraps(original)
    def update(
        self: Cache, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if current_pass() is None and _STAMP not in vars(self):
            return original(self, key_states, value_states, layer_idx, *args, **kwargs)
        _check_stamp(self, layer_idx)
        if current_pass() is None:
            _make_room(self, layer_idx, key_states)
            return original(self, key_states, value_states, layer_idx, *args, **kwargs)
        _normal_storage(self, layer_idx)
        (key, dkey), (value, dvalue) = split(key_states), split(value_states)
        packed = dkey is not None or dvalue is not None
        if packed:
            key_states, value_states = pack(key, dkey), pack(value, dvalue)
        _make_room(self, layer_idx, key_states)
        keys, values = original(self, key_states, value_states, layer_idx, *args, **kwargs)
        vars(self.layers[layer_idx])[_PACKED] = packed
        if not packed:
            return keys, values
        return unpack(keys, key.requires_grad), unpack(values, value.requires_grad)

    return update


def _is_stamped(cache: Cache) -> bool:
    return _STAMP in vars(cache)


def _wrap_indexer_update(original: Any) -> Any:
    @functools.wraps(original)
    def update(self: Cache, states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if current_pass() is not None and carries_tangent(states):
            raise NotImplementedError(
                f"{original.__name__}: what this cache keeps would lose its tangents between decoding steps. Generate "
                "with `use_cache=False`, or merge the mix first (`model.linearized(False)`)."
            )
        return original(self, states, *args, **kwargs)

    return update


def install() -> None:
    """Teaches `Cache.update` to keep tangents; a second call changes nothing."""
    if "__wrapped__" in vars(Cache.update):
        return
    Cache.update = _wrap_update(Cache.update)  # type: ignore[method-assign]
    for name in ("get_conv_state", "get_recurrent_state", "update_conv_state", "update_recurrent_state"):
        if name in vars(Cache):
            setattr(Cache, name, wrap_state_access(vars(Cache)[name], _check_stamp, _is_stamped))
    if "update_indexer" in vars(Cache):
        Cache.update_indexer = _wrap_indexer_update(Cache.update_indexer)  # type: ignore[method-assign]


install()
