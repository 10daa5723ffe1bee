"""The derivative of attention behind transformers' `AttentionInterface`; the user's implementation serves the primal.

PyTorch's fused attention kernels have no derivative. While a linearized pass is open the model's attention goes to
`tangent_attention`: the primal to the implementation the user chose, the tangent to `attention_rule.py`. Attention on
inputs without tangents is the user's alone.

Seam: `AttentionInterface` and `AttentionMaskInterface`. The name must not contain "sdpa", "flash" or "flex", on which
transformers runs support checks. "eager" stays itself: its plain operations differentiate themselves.
Letters: B batch, T queries, S keys, H heads, K key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tangent_peft.forward.attention_rule import AttentionShape
from tangent_peft.forward.level import LinearizedPass, carries_tangent, current_pass, dual, split
from tangent_peft.forward.sdpa import SdpaDerivative, attention_tangent


NAME = "tangent"
_PAGED = (
    "Attention implementation {!r} with a paged cache (continuous batching, `generate_batch`): it updates the cache "
    "itself and would lose the tangents. Use `model.generate`, or merge the mix first (`model.linearized(False)`)."
)
_FLEX = (
    "Attention implementation {!r} has no derivative: its masks are programs that only its own kernel can read. Load "
    "the model with attn_implementation='sdpa' (or 'eager')."
)
_OWN_KERNEL = (
    "Attention implementation {!r} of a model with attention classes of its own: it calls the kernel by itself, which "
    "has no derivative. Load the model with attn_implementation='eager'."
)
_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k")  # where each sequence of a packed row begins, for flash kernels


def derive_attention(opened: LinearizedPass) -> None:
    """Dispatches the attention of `opened.root` to `tangent_attention` until the pass closes."""
    own_call = False
    for config, through_interface in attention_configs(opened.structure.select(has_config)):
        chosen = config._attn_implementation
        if chosen in (None, "eager", NAME):
            continue
        check_attention(chosen, through_interface)
        if not through_interface:
            own_call = True
            continue
        opened.primal_attention[id(config)] = chosen
        config._attn_implementation_internal = NAME
        opened.contexts.callback(_restore, config, chosen)
    torch_attention = bool(opened.structure.select(_is_torch_attention))
    if torch_attention and torch.backends.mha.get_fastpath_enabled():  # fused layers without a derivative
        opened.contexts.callback(torch.backends.mha.set_fastpath_enabled, True)
        torch.backends.mha.set_fastpath_enabled(False)
    if own_call or torch_attention or _calls_kernels(opened):
        opened.modes.enter_context(SdpaDerivative())


def _is_torch_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention)


def _calls_kernels(opened: LinearizedPass) -> bool:
    """Whether there may be calls of `F.scaled_dot_product_attention` past transformers' interface."""
    if not isinstance(opened.root, PreTrainedModel):
        return True
    return any(home.startswith("timm.") for home in opened.structure.homes)


def attention_configs(modules: Iterable[nn.Module]) -> list[tuple[Any, bool]]:
    """The configs that `modules` hold, each with whether its models look up their attention in `AttentionInterface`.

    A model that does not has classes of its own, by implementation: it must find the name it was built with.
    """
    configs: dict[int, Any] = {}
    own: dict[int, bool] = {}
    for module in modules:
        if not has_config(module):
            continue
        key = id(module.config)
        configs[key] = module.config
        if isinstance(module, PreTrainedModel):
            own[key] = own.get(key, True) and not type(module)._can_set_attn_implementation()
    return [(config, not own.get(key, False)) for key, config in configs.items()]


def check_attention(chosen: str, through_interface: bool) -> None:
    """Refuses an implementation whose derivative is not known, wherever it is used.

    Args:
        chosen: its name in the model's config.
        through_interface: whether the model looks it up in `AttentionInterface`.

    Raises:
        NotImplementedError: for a paged cache, flex attention, and kernels that a model calls by itself.
    """
    if chosen.startswith("paged|"):
        raise NotImplementedError(_PAGED.format(chosen))
    if "flex" in chosen:
        raise NotImplementedError(_FLEX.format(chosen))
    if not through_interface and chosen != "sdpa":
        raise NotImplementedError(_OWN_KERNEL.format(chosen))


def has_config(module: nn.Module) -> bool:
    """Whether the module has a config of transformers, which may name its attention."""
    return isinstance(vars(module).get("config"), PreTrainedConfig)


def _restore(config: Any, chosen: str) -> None:
    config._attn_implementation_internal = chosen


def _primal_implementation(config: Any) -> str:
    running = current_pass()
    if running is None or id(config) not in running.primal_attention:
        raise RuntimeError(
            f"Attention implementation {NAME!r} is only for the inside of a linearized forward, but the config of "
            f"{type(config).__name__} names it outside of one. Either something set it (set another one, e.g. "
            "`model.set_attn_implementation('sdpa')`), or this is a backward pass that replays blocks while another "
            "thread runs a linearized forward of the same model: let one wait for the other."
        )
    return running.primal_attention[id(config)]


def tangent_mask(*args: Any, config: Any, **kwargs: Any) -> Any:
    """The mask of the implementation that serves the primal."""
    return ALL_MASK_ATTENTION_FUNCTIONS[_primal_implementation(config)](*args, config=config, **kwargs)


def tangent_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention with a tangent, in the signature of transformers' attention functions.

    Args:
        module: the attention module.
        query: (B, H, T, E), possibly dual.
        key: (B, K, S, E), possibly dual.
        value: (B, K, S, E), possibly dual.
        attention_mask: what the primal's implementation takes: `None`, bool or additive (B, 1 or H, T, S), or a
            padding mask (B, S).
        scaling: s; `None` is 1/√E.
        dropout: probability of dropping a weight; 0 where there is a tangent.
        **kwargs: what else the primal's implementation takes; read here: `is_causal`, `sliding_window`, `softcap`,
            `s_aux`, `position_bias`, `cache`, `cu_seq_lens_q`, `cu_seq_lens_k`, `position_ids`.

    Returns:
        The dual output (B, T, H, E), and the attention weights if the primal's implementation returns them.

    Raises:
        NotImplementedError: for a mask, bias or packing whose derivative is not implemented, and for a paged cache.
        ValueError: for attention dropout, which would have to be drawn twice.
    """
    chosen = _primal_implementation(module.config)
    (q, dq), (k, dk), (v, dv) = split(query), split(key), split(value)
    if carries_tangent(attention_mask):
        raise NotImplementedError(
            f"{type(module).__name__} computes its attention mask from hidden states that carry a tangent, and the "
            f"kernel of {chosen!r} takes a fixed mask. Load the model with attn_implementation='eager'."
        )
    bias = kwargs.get("position_bias")
    if carries_tangent(bias):
        raise NotImplementedError(
            f"The position bias of {type(module).__name__} carries a tangent, and the kernel of {chosen!r} takes a "
            "fixed one. Take the embedding that it is read from out of `target_modules`, or load the model with "
            "attn_implementation='eager'."
        )
    if not (dq is None and dk is None and dv is None):
        _check_kernel(chosen, q, attention_mask, kwargs)
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    out, weights = _primal_attention(chosen, module, q, k, v, attention_mask, options)
    if dq is None and dk is None and dv is None:
        return out, weights
    if dropout > 0:
        raise ValueError(
            f"Attention dropout {dropout} in a linearized forward: the kernel does not tell which weights it dropped, "
            "so value and derivative would disagree. Set `attention_dropout=0` in the config or call `model.eval()`."
        )
    if bias is not None:
        attention_mask = _with_bias(module, chosen, q, k, attention_mask, bias, kwargs)
    mask = _allowed_keys(attention_mask, k)
    shape = _shape_of(module, chosen, q, k, attention_mask, scaling, kwargs)
    sinks = kwargs.get("s_aux")
    tangent = attention_tangent((q, k, v, out.transpose(1, 2)), (dq, dk, dv), mask, sinks, shape)
    return dual(out, tangent.transpose(1, 2)), weights


def _primal_attention(
    chosen: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, options: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The user's implementation, which finds its own name in the config: flash kernels look it up there."""
    config: Any = module.config
    config._attn_implementation_internal = chosen
    try:
        return ALL_ATTENTION_FUNCTIONS[chosen](module, q, k, v, mask, **options)
    finally:
        config._attn_implementation_internal = NAME


def _with_bias(
    module: nn.Module, chosen: str, q: Tensor, k: Tensor, mask: Any, bias: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """The additive mask that stands for `mask` and a position bias (1 or B, H, T, S), as transformers builds it."""
    if chosen != "sdpa" or not (mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)):
        raise NotImplementedError(
            f"{type(module).__name__} adds a learned position bias to its attention, whose derivative is implemented "
            f"for attn_implementation='sdpa' and 'eager', not for {chosen!r} with this mask. Load the model with one "
            "of these."
        )
    given = kwargs.get("is_causal")
    causal = (_is_causal(module) if given is None else bool(given)) and mask is None and q.shape[2] > 1
    return create_position_bias_mask(bias[..., : k.shape[2]], _allowed_keys(mask, k), causal, q, k)


def _shape_of(
    module: nn.Module,
    chosen: str,
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> AttentionShape:
    flash = "flash" in chosen  # these align the last query with the last key, and slide a window at every length
    given = kwargs.get("is_causal")
    causal = _is_causal(module) if given is None else bool(given)
    window = kwargs.get("sliding_window")
    if mask is not None and mask.ndim != 2:  # it says all
        causal, window = False, None
    if flash and not causal and window is not None and k.shape[2] > window:
        raise NotImplementedError(
            f"{type(module).__name__} attends in both directions within a sliding window of {window}, whose derivative "
            "is not implemented for flash kernels. Load the model with attn_implementation='sdpa' (or 'eager')."
        )
    return AttentionShape(
        scale=q.shape[-1] ** -0.5 if scaling is None else float(scaling),
        causal=causal and (flash or q.shape[2] > 1),
        offset=k.shape[2] - q.shape[2] if flash else 0,
        window=window,
        softcap=kwargs.get("softcap"),
    )


def _check_kernel(chosen: str, q: Tensor, mask: Any, kwargs: dict[str, Any]) -> None:
    """Refuses what a kernel learns by another way than the mask."""
    if kwargs.get("cache") is not None:
        raise NotImplementedError(_PAGED.format(chosen))
    if isinstance(mask, Tensor) and mask.ndim > 2:  # it says all
        return
    packed = any(kwargs.get(name) is not None for name in _PACKING)
    positions = kwargs.get("position_ids")
    if not packed and mask is None and chosen != "sdpa" and positions is not None and q.shape[0] == 1:
        packed = bool((positions.diff(dim=-1) <= 0).any())  # what transformers' flash kernels take for packing
    if packed:
        raise NotImplementedError(
            f"Attention implementation {chosen!r} got several sequences packed in a row, by `cu_seq_lens_q` or by "
            "`position_ids` that start anew; the derivative does not tell them apart. Pad them instead "
            "(`padding_free=False`), or load the model with attn_implementation='sdpa' (or 'eager')."
        )


def _is_causal(module: nn.Module) -> bool:
    """What transformers' own kernels take a module for that does not say."""
    try:
        return bool(module.is_causal)
    except AttributeError:
        return True


def _allowed_keys(mask: Any, k: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"Linearized attention got a mask of type {type(mask).__name__}, which only its own kernel can read. Load "
            "the model with attn_implementation='sdpa' (or 'eager')."
        )
    if mask.ndim == 2:  # padding (B, S), as flash kernels take it
        return mask[:, None, None, : k.shape[2]].bool()
    return mask[..., : k.shape[2]]


AttentionInterface.register(NAME, tangent_attention)
AttentionMaskInterface.register(NAME, tangent_mask)
