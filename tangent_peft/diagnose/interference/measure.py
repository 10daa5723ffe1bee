"""Do axes interfere? What each one adds to the hidden states of the same prompts, compared pair by pair.

The shift of an axis is exact, J·τ by one dual forward (`shift="tangent"`), or the difference h(θ₀ + τ) − h(θ₀) of the
two networks (`shift="weights"`), which is what TS-DPO (arXiv 2602.01128, §4.4) compares for ordinary DPO. Shifts are
taken from the residual stream before the final norm; a tangent on the head lies above it and has no part in them.
Layer, token and number of directions are not in the paper: they are chosen here, and stand in the result.

Two tangents of one model share its Jacobian, so their shifts go together across prompts whatever the axes are, far
beyond what random pairings of the prompts have. So each axis is also compared with a control of the other: the same τ
writing in random directions (`controls.py`). What a pair of axes has in common beyond that is its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import check_layer, decoder_blocks, layer_states, layer_tangents, row_means
from tangent_peft.diagnose.interference.controls import scrambled
from tangent_peft.diagnose.interference.overlap import Overlap, check_overlap_settings, shift_overlap
from tangent_peft.diagnose.interference.result import (
    AxisOverlap,
    ControlOverlap,
    Interference,
    InterferenceSettings,
)
from tangent_peft.diagnose.prompts import TokenBatch, answer_batches, prompt_batches
from tangent_peft.diagnose.spool import Spool
from tangent_peft.diagnose.states import ModelState
from tangent_peft.tuner.axes import check_known, refuse_saved_modules, tangent_tuner


Variant: TypeAlias = tuple[str, bool]  # name of an axis, and whether it is the axis's control


@torch.no_grad()
def axis_interference(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Any],
    axes: Sequence[str] | None = None,
    settings: InterferenceSettings | None = None,
) -> Interference:
    """Compares what axes add to the hidden states of the same prompts.

    Two forwards per axis and batch, one of them of its control, and one of the base for `shift="weights"`. Shifts lie
    in temporary files of N · layers · d · 4 bytes, two per axis; memory does not grow with the number of prompts.

    Args:
        model: a `PeftModel` with tangent axes; each is looked at alone, at λ = 1. The active mix does not count.
        tokenizer: with a chat template.
        data: prompts (text, or lists of messages); for `position="answer"` pairs with `prompt`, `chosen`, `rejected`.
        axes: two or more; `None`: all of them.
        settings: layers, position, kind of shift, CCA and seed.

    Returns:
        Every pair of axes at every layer.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for an unknown axis, fewer than two, no data, an empty answer, or settings that do not fit.
        IndexError: for a layer that is out of range.
    """
    settings = settings or InterferenceSettings()
    tuner = tangent_tuner(model)
    names = list(tuner.peft_config) if axes is None else list(axes)
    check_known(tuner, names)
    refuse_saved_modules(tuner, names)
    if len(set(names)) < 2 or len(set(names)) < len(names):
        raise ValueError(f"Axes are compared in pairs, each named once; found {names}. Give two or more.")
    check_overlap_settings(len(data), settings.components, settings.energy, settings.permutations)
    base = ModelState.base(model)
    last = len(decoder_blocks(base.root))
    layers = sorted({check_layer(index, last) for index in settings.layers})
    pairs = []
    with ExitStack() as stack:
        spools: dict[Variant, Spool] = {}
        for batch in _batches(tokenizer, data, settings, base):
            for variant, shifts in _shifts(model, names, batch, settings):
                rows = row_means(shifts[layers], batch.keep).transpose(0, 1)
                if variant not in spools:
                    spools[variant] = stack.enter_context(Spool(tuple(rows.shape[1:])))
                spools[variant].append(rows)
        for (first, second), (place, layer) in itertools.product(itertools.combinations(names, 2), enumerate(layers)):
            pairs.append(_compared(spools, (first, second), place, layer, settings))
    dtype = str(base.root.dtype).removeprefix("torch.")
    return Interference(names, len(data), layers, last, dtype, settings, pairs)


def _batches(
    tokenizer: PreTrainedTokenizerBase, data: Sequence[Any], settings: InterferenceSettings, base: ModelState
) -> Iterator[TokenBatch]:
    if settings.position == "answer":
        return answer_batches(tokenizer, data, settings.batch_size, base.device)
    return prompt_batches(tokenizer, data, settings.batch_size, base.device)


def _shifts(
    model: torch.nn.Module, names: Sequence[str], batch: TokenBatch, settings: InterferenceSettings
) -> Iterator[tuple[Variant, Tensor]]:
    """What each axis, and each control, adds at every layer (L + 1, n, D)."""
    before = None
    if settings.shift == "weights":
        with ModelState.mix(model, {}).active() as root:
            before = layer_states(root, batch.inputs, batch.keep)
    variants = itertools.product(names, (False, True) if settings.controls else (False,))
    for index, (name, control) in enumerate(variants):
        state = ModelState.mix(model, {name: 1.0}, linearized=before is None)
        changed = scrambled(model, name, settings.seed * len(names) * 2 + index) if control else nullcontext()
        with changed, state.active() as root:
            if before is None:
                shift = layer_tangents(root, batch.inputs, batch.keep)[1]
            else:
                shift = layer_states(root, batch.inputs, batch.keep) - before
        yield (name, control), shift


def _compared(
    spools: Mapping[Variant, Spool], names: tuple[str, str], place: int, layer: int, settings: InterferenceSettings
) -> AxisOverlap:
    def overlap(first: Variant, second: Variant, permutations: int) -> Overlap:
        return shift_overlap(
            spools[first].array()[:, place],
            spools[second].array()[:, place],
            components=settings.components,
            energy=settings.energy,
            permutations=permutations,
            seed=settings.seed,
        )

    one, other = names
    controls = []
    for variants in (((one, False), (other, True)), ((one, True), (other, False))) if settings.controls else ():
        found = overlap(*variants, permutations=0)
        controls.append(ControlOverlap(found.cosine, found.cka_debiased, found.cca.mean))
    norms = (_mean_norm(spools[one, False], place), _mean_norm(spools[other, False], place))
    whole = overlap((one, False), (other, False), settings.permutations)
    return AxisOverlap(one, other, layer, norms, whole, controls)


def _mean_norm(spool: Spool, place: int) -> float:
    total = sum(float(chunk[:, place].double().norm(dim=1).sum()) for chunk in spool.chunks())
    return total / spool.count
