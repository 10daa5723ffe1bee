"""A mix for every row of a batch: `axis_weights=[{…}, {…}]`, and PEFT's `adapter_names=[…]`.

For the time of a `with` block λ of an axis is a vector, one number per row, and every wrapped layer multiplies what
the axis adds by the number of the row. A hook on the model tells where the rows lie in the batch of each forward:
`generate` repeats every row for its beams. Knows no layer and no trainer.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from tangent_peft.forward.structure import Structure
from tangent_peft.tuner import axes
from tangent_peft.tuner.layer import TangentLayer
from tangent_peft.tuner.live import LiveMix, RowLayout, Rows, row_weights
from tangent_peft.tuner.targets import head_name, text_decoder


if TYPE_CHECKING:
    from tangent_peft.tuner.verbs import AxisVerbs


KEYWORD = "axis_weights"
BASE = "__base__"  # PEFT's name of the base model in `adapter_names`

#: Model types whose layers see (T, B, …): where T = B nothing else would tell.
TIME_FIRST = frozenset({"xlnet", "fsmt", "longformer", "led"})

# What holds one entry per row in the inputs of a forward, the one that decides first.
_INPUTS = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "input_ids",
    "inputs_embeds",
    "inputs",
    "input_values",
    "input_features",
    "pixel_values",
)


@contextmanager
def mixed_rows(tuner: AxisVerbs, mixes: Sequence[Mapping[str, float]]) -> Iterator[None]:
    """Gives each row of the batches inside the block its own mix; the axes are frozen, as for inference.

    Raises:
        ValueError: for no mixes, an unknown axis, a λ that is not finite, a merged model, an axis that keeps modules of
            its own.
        TypeError: if the mixes are not a list of dicts.
        NotImplementedError: for a model that puts time first.
    """
    mixes = mixes if isinstance(mixes, (Mapping, str)) else list(mixes)
    if isinstance(mixes, (Mapping, str)) or not all(isinstance(mix, Mapping) for mix in mixes):
        raise TypeError(
            f"`{KEYWORD}` is a list with one dict {{axis: λ}} for every row of the batch; found {mixes!r}. For one mix "
            "for all rows use `with model.axes({...}):`."
        )
    if not mixes:
        raise ValueError(f"`{KEYWORD}` is empty. Give one mix for every row of the batch, `{{}}` for the base model.")
    _refuse_time_first(tuner.model)
    checked = [axes.check_weights(tuner, mix) for mix in mixes]
    weights = row_weights(checked)
    axes.refuse_saved_modules(tuner, dict.fromkeys(weights, 1.0))
    with axes.preserved(tuner):
        axes.switch(tuner, weights, Rows(len(checked)))
        yield


def _refuse_time_first(model: nn.Module) -> None:
    kind = model.config.model_type if isinstance(model, PreTrainedModel) else None
    if kind in TIME_FIRST:
        raise NotImplementedError(
            f"{type(model).__name__} puts time before rows in its layers' inputs, which have one mix. Run the rows of "
            "each mix as a batch of their own, inside `with model.axes({...}):`."
        )


@contextmanager
def rows_of_call(tuner: AxisVerbs, kwargs: Mapping[str, Any]) -> Iterator[None]:
    """The block in which the arguments of a call of forward or `generate` give rows their mixes, if they do.

    Raises:
        ValueError: as `mixed_rows`, and if both `axis_weights` and `adapter_names` are given.
    """
    mixes, names = kwargs.get(KEYWORD), kwargs.get("adapter_names")
    if mixes is not None and names is not None:
        raise ValueError(f"`{KEYWORD}` and `adapter_names` are two ways to say the same; give one of them.")
    if mixes is None and names is not None:
        mixes = [{} if name == BASE else {name: 1.0} for name in names]
    if mixes is None:
        yield
        return
    live = tuner.tangent_live
    with live.turn:  # calls of several threads, each with mixes of its own, wait for each other
        before, live.calling = live.calling, threading.get_ident()
        try:
            with mixed_rows(tuner, mixes):
                yield
        finally:
            live.calling = before


@contextmanager
def repeated_rows(tuner: AxisVerbs, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """The block in which `generate` may repeat each row, for beams and for several answers.

    Raises:
        ValueError: if its inputs have not one row for every mix.
    """
    rows = tuner.tangent_live.rows
    if rows is None:
        if kwargs.get(KEYWORD) is not None:
            raise ValueError(_NOT_OPEN.format(type(tuner.model).__name__))
        yield
        return
    rows.enter(_input_shape(args, kwargs))
    rows.batch, rows.repeated = None, True
    try:
        yield
    finally:
        rows.repeated = False


def note_layouts(model: nn.Module, blocks: tuple[str, int] | None) -> None:
    """Notes at each layer how rows may lie in its inputs.

    The blocks of a transformers model get (B, T, D), or all tokens in their order; what is above them also one pooled
    entry per row. A layer in another `ModuleList` or `ModuleDict` may be an expert: even where it gets as many tokens
    as there are, nothing tells their order. Beside the text decoder of a model with images nothing is known: an image
    is no row. Of a model that is not of transformers little is known.

    Args:
        model: the wrapped model.
        blocks: name and length of its list of blocks.
    """
    lists = [n for n, m in model.named_modules() if isinstance(m, (nn.ModuleList, nn.ModuleDict))]
    own = blocks[0] if blocks is not None and isinstance(model, PreTrainedModel) else None
    experts = tuple(f"{name}." for name in lists if name != own)
    beside = _beside_the_decoder(model)
    for layer in axes.tangent_layers(model):
        known: set[RowLayout] = {"batch", "tokens"}
        if layer in beside:
            known = set()
        elif layer.layer_name.startswith(experts):
            known = {"exact" if own is None else "batch"}
        elif own is None:
            known = {"exact", "tokens"}
        elif not layer.layer_name.startswith(f"{own}."):
            known = {"batch", "tokens", "rows"}
        layer.tangent_rows = frozenset(known)


def _beside_the_decoder(model: nn.Module) -> set[nn.Module]:
    """The wrapped layers of a decoder-only model that are neither in its text decoder nor its head."""
    decoder = text_decoder(model)
    if decoder is None or not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        return set()
    inside = set(model.get_submodule(decoder).modules()) | {model.get_output_embeddings()}
    inside |= {module for name, module in model.named_children() if name == head_name(model)}
    return {layer for layer in axes.tangent_layers(model) if layer not in inside}


class RowForward:
    """The hook that tells, at each call of a module, how many rows its batch has.

    Args:
        root: the module whose call is one forward pass.
        live: λ of its axes.
    """

    def __init__(self, root: nn.Module, live: LiveMix) -> None:
        self.live = live
        self._structure: Structure | None = None
        self.handles = [
            root.register_forward_pre_hook(self._enter, with_kwargs=True),
            root.register_forward_hook(self._leave, always_call=True),
        ]

    @staticmethod
    def installed(root: nn.Module) -> RowForward | None:
        """The hook that is on `root`, or `None`."""
        methods = (hook for hook in root._forward_pre_hooks.values() if isinstance(hook, MethodType))
        return next((m.__self__ for m in methods if isinstance(m.__self__, RowForward)), None)

    def remove(self) -> None:
        """Takes the hook away."""
        for handle in self.handles:
            handle.remove()

    def _enter(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.live.calling not in (None, threading.get_ident()):
            with self.live.turn:
                pass
        self._take_in_copies(root)
        given = kwargs.pop(KEYWORD, None)
        if self.live.rows is not None:
            self.live.rows.enter(_input_shape(args, kwargs))
        elif given is not None:
            raise ValueError(_NOT_OPEN.format(type(root).__name__))
        return args, kwargs

    def _take_in_copies(self, root: nn.Module) -> None:
        """A wrapped layer that was copied into the model, as depth up-scaling does, came with λ of its own."""
        self._structure = Structure.of(root, self._structure)
        for layer in self._structure.select(_is_wrapped):
            layer.tangent_live = self.live

    def _leave(self, root: nn.Module, args: Any, output: Any) -> None:
        if self.live.rows is not None:
            self.live.rows.batch = None


def _is_wrapped(module: nn.Module) -> bool:
    return isinstance(module, TangentLayer)


_NOT_OPEN = (
    f"`{KEYWORD}` came to {{}}, whose axes are disabled or which was called past its PeftModel, so no row would get "
    "its mix. Call the PeftModel with its adapters enabled, or put the call inside `with model.axes([...]):`."
)


def _input_shape(args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape (B, T, …) of a call's main input."""
    named = [kwargs[name] for name in _INPUTS if isinstance(kwargs.get(name), Tensor)]
    found = [*named, *(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 0)]
    if not found:
        raise ValueError("A mix for every row needs a batch: the call has no tensor among its arguments.")
    return tuple(found[0].shape)
