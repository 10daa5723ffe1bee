"""How far the network at θ(λ) is from the linearized model: the linearity gap.

gap(λ) = ‖f(θ₀ + Δ) − f_lin(λ)‖ / ‖J·Δ‖,  Δ = Σ λᵢ τᵢ, on the logits of all real positions. 0: merging loses nothing.
About 0.1: the merged model does what the linearized one was trained to do. Near 1 and beyond it is another model, which
has to be judged on its own. To first order the gap grows in proportion to ‖λ‖.

In bfloat16 and float16 the two networks are rounded each in its own way, and where a mix does little that is most of
what is measured: the gap then rises as λ falls. Where that matters, measure in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tangent_peft.forward import evaluating
from tangent_peft.tuner.axes import check_enabled, tangent_tuner


GAP_LIMIT = 0.5  # from where on a merged mix is called another model than the linearized one


@dataclass(frozen=True)
class LinearityGap:
    """Result of `linearity_gap`.

    Attributes:
        weights: the mix λ it was measured at.
        gap: ‖f(θ₀ + Δ) − f_lin‖ / ‖J·Δ‖; 0 for an empty mix.
        effect: ‖J·Δ‖ / ‖f(θ₀)‖, how much the mix changes the logits at all.
        tokens: number of positions it was measured on.
    """

    weights: dict[str, float]
    gap: float
    effect: float
    tokens: int

    def __str__(self) -> str:
        return f"linearity gap {self.gap:.3f} at {self.weights} ({self.tokens} tokens, effect {self.effect:.3f})"


@torch.no_grad()
def linearity_gap(model: torch.nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> LinearityGap:
    """Measures the gap of the active mix; three forwards per batch.

    Args:
        model: a `PeftModel` with tangent axes, the mix to judge active.
        batches: model inputs with `input_ids` (B, T) and, if padded, `attention_mask` (B, T). With `logits_to_keep` the
            logits it selects are compared, and must be those of real tokens.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: if the batches hold no tokens, or adapters are disabled.
    """
    tuner = tangent_tuner(model)
    check_enabled(tuner)
    weights = tuner.axis_weights
    sums = torch.zeros(3, dtype=torch.float64)
    tokens = 0
    with evaluating(model):
        for inputs in batches:
            with tuner.linearized(True):
                linear = model(**inputs, use_cache=False).logits
            real = real_positions(inputs, linear)
            linear = linear[real]
            with tuner.linearized(False):
                merged = model(**inputs, use_cache=False).logits[real]
            with tuner.axes({}):
                base = model(**inputs, use_cache=False).logits[real]
            squares = [x.square().sum(dtype=torch.float64).cpu() for x in (merged - linear, linear - base, base)]
            sums += torch.stack(squares)
            tokens += base[..., 0].numel()
    if not tokens:
        raise ValueError("The batches to measure the linearity gap on hold no tokens. Give at least one batch.")
    missed, moved, size = (float(value) ** 0.5 for value in sums)
    return LinearityGap(weights, missed / moved if moved else 0.0, moved / size if size else 0.0, tokens)


def real_positions(inputs: Mapping[str, Tensor], logits: Tensor) -> Any:
    """An index of the logits (B, T, V) that are not of padding; all of those of a classifier (B, C).

    Args:
        inputs: of the model, as `linearity_gap` takes them.
        logits: what the model gave for them.
    """
    if "logits_to_keep" in inputs or logits.ndim < 3:
        return ...
    return inputs["attention_mask"].bool() if "attention_mask" in inputs else inputs["input_ids"] >= 0
