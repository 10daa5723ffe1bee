"""D-STEER (arXiv 2512.11838): is what training did to the hidden states one vector?

For each prompt, δ_i = h_tuned(x_i) − h_base(x_i) at one position and layer, (D,); v⋆ is their mean. Measured per layer:
how well each δ_i points along v⋆ (cosine), and how close ΔH = [δ_1 … δ_N] is to rank one (singular values).

Two cautions that the paper leaves out stand beside. v⋆ holds δ_i itself, so its cosine is too large for few prompts;
those of leave-one-out and held-out rows are not. And σ₂/σ₁ is small whenever the mean is large; less the mean, it need
not be.

δ is written to disk prompt by prompt, and read back layer by layer: memory does not grow with the number of prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tangent_peft.diagnose.activations import decoder_blocks, layer_states, layer_tangents, row_means
from tangent_peft.diagnose.moments import Moments
from tangent_peft.diagnose.prompts import TokenBatch
from tangent_peft.diagnose.spool import Spool
from tangent_peft.diagnose.states import ModelState, check_comparable
from tangent_peft.diagnose.steering.shift import BIN_EDGES, Cosines, LayerShift, Recovery, ShiftSpectrum, SteeringShift
from tangent_peft.diagnose.steering.vectors import SteeringVectors


@dataclass(frozen=True)
class ShiftOptions:
    """How the shift of the hidden states is measured.

    Attributes:
        epsilon: of rank_ε, the number of singular values above ε σ₁; the paper names none.
        top: how many singular values are reported.
        control_seeds: number of random directions that the recovery is compared with.
        seed: of the first of them.
    """

    epsilon: float = 0.1
    top: int = 5
    control_seeds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.epsilon < 1:
            raise ValueError(f"`epsilon` is a share of σ₁ between 0 and 1; found {self.epsilon}.")
        if self.top < 2 or self.control_seeds < 2:
            raise ValueError(f"`top` ({self.top}) and `control_seeds` ({self.control_seeds}) are at least 2.")


@torch.no_grad()
def steering_vectors(
    base: ModelState,
    tuned: ModelState,
    batches: Iterable[TokenBatch],
    position: str,
    held_out: Iterable[TokenBatch] = (),
    options: ShiftOptions = ShiftOptions(),
) -> tuple[SteeringVectors, SteeringShift]:
    """Measures v⋆ at every layer, and how much of the shift it explains.

    Args:
        base: the model before, for example `ModelState.base(model)`.
        tuned: the model after, of the same architecture: a mix of axes, or another checkpoint.
        batches: what to read, of one row per prompt or answer; δ is the mean over the kept positions of a row.
        position: what these positions are, for the record, such as "last prompt token".
        held_out: other rows, on which v⋆ is judged; none: no held-out numbers.
        options: thresholds and seeds.

    Returns:
        The vectors of layers 1 to L, and the numbers.

    Raises:
        ValueError: for models that differ in architecture, fewer than two rows, or activations that are not finite.
    """
    check_comparable(base, tuned)
    layers = len(decoder_blocks(base.root))
    size = base.root.config.get_text_config().hidden_size
    with Spool((layers + 1, size)) as seen, Spool((layers + 1, size)) as judged:
        scales = _record(base, tuned, batches, seen)
        _record(base, tuned, held_out, judged)
        if seen.count < 2:
            raise ValueError(f"{seen.count} rows are given; v⋆ and its spectrum need at least two, better 32.")
        means = _means(seen)
        root = tuned.root
        vectors = SteeringVectors(
            {layer: means[layer].float() for layer in range(1, layers + 1)},
            root.name_or_path or type(root).__name__,
            type(root).__name__,
            layers,
            base.name,
            tuned.name,
            position,
            seen.count,
            {"dtype": str(root.dtype), "linearized": tuned.linearized},
        )
        controls = [vectors.random(options.seed + index) for index in range(options.control_seeds)]
        measured = [
            _layer(layer, _Rows(seen, layer), _Rows(judged, layer), scales[layer], means[layer], controls, options)
            for layer in range(1, layers + 1)
        ]
        counts = seen.count, judged.count
    settings = {
        **vectors.settings,
        "model": vectors.model,
        "epsilon": options.epsilon,
        "top": options.top,
        "control_seeds": options.control_seeds,
        "seed": options.seed,
        "vectors_digest": vectors.digest,
    }
    return vectors, SteeringShift(base.name, tuned.name, position, *counts, BIN_EDGES.tolist(), measured, settings)


def shift_rows(base: ModelState, tuned: ModelState, batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """δ of each row and layer, and the norm of the base's own hidden state.

    Returns:
        (B, L + 1, D) and (B, L + 1), both in float32. Of a linearized mix on its own base δ is exact, J·τ.
    """
    if tuned.model is base.model and not base.adapters and tuned.linearized and tuned.weights:
        with tuned.active() as root:
            states, shift = layer_tangents(root, batch.inputs, batch.keep)
    else:
        with base.active() as root:
            states = layer_states(root, batch.inputs, batch.keep)
        with tuned.active() as root:
            shift = layer_states(root, batch.inputs, batch.keep).to(states.device) - states
    shift, states = (row_means(x, batch.keep).transpose(0, 1) for x in (shift, states))
    return shift, states.norm(dim=2)


class _Rows:
    """δ of one layer, of all rows, in float64; read from disk some at a time."""

    def __init__(self, spool: Spool, layer: int) -> None:
        self._held, self.count = spool.array()[:, layer], spool.count

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, self.count, 256):
            yield torch.from_numpy(np.array(self._held[start : start + 256], dtype=np.float64))


def _record(base: ModelState, tuned: ModelState, batches: Iterable[TokenBatch], spool: Spool) -> Tensor:
    """Writes δ of every row; returns the mean norm of the base's hidden states (L + 1,)."""
    total = torch.zeros(spool.shape[0], dtype=torch.float64)
    for batch in batches:
        shift, sizes = shift_rows(base, tuned, batch)
        if not bool(shift.isfinite().all()):
            row = int((~shift.isfinite()).flatten(1).any(1).nonzero()[0]) + spool.count
            raise ValueError(f"The hidden states of row {row} are not finite. Take smaller λ, or load in float32.")
        spool.append(shift)
        total += sizes.double().sum(0).cpu()
    return total / max(spool.count, 1)


def _means(spool: Spool) -> Tensor:
    total = torch.zeros(spool.shape, dtype=torch.float64)
    for chunk in spool.chunks():
        total += chunk.double().sum(0)
    return total / spool.count


def _layer(
    layer: int,
    rows: _Rows,
    judged: _Rows,
    scale: Tensor,
    mean: Tensor,
    controls: list[SteeringVectors],
    options: ShiftOptions,
) -> LayerShift:
    size = float(mean.norm())
    relative = size / float(scale) if float(scale) else math.nan
    if not any(bool(chunk.any()) for chunk in rows):
        nothing = "the tuned model does nothing here: every δ is 0"
        empty = ShiftSpectrum.missing()
        return LayerShift(layer, 0.0, 0.0, None, None, None, empty, empty, math.nan, None, nothing)
    usual = torch.cat([_cosine(chunk, mean) for chunk in rows])
    others = torch.cat([_cosine(chunk, (rows.count * mean - chunk) / (rows.count - 1)) for chunk in rows])
    new = torch.cat([_cosine(chunk, mean) for chunk in judged]) if judged.count else None
    values, first = _singular(rows, centred=False)
    spread, _ = _singular(rows, centred=True)
    return LayerShift(
        layer,
        size,
        relative,
        Cosines.of(usual),
        Cosines.of(others),
        None if new is None else Cosines.of(new),
        ShiftSpectrum.of(values, options.epsilon, options.top),
        ShiftSpectrum.of(spread, options.epsilon, options.top),
        float(_cosine(first, mean).abs()),
        _recovery(judged, mean, [control.vectors[layer].double() for control in controls]) if judged.count else None,
        "",
    )


def _cosine(rows: Tensor, other: Tensor) -> Tensor:
    """⟨δ, v⟩ / ‖δ‖‖v‖ along the last axis; NaN where one of them is 0."""
    return (rows * other).sum(-1) / (rows.norm(dim=-1) * other.norm(dim=-1))


def _singular(rows: _Rows, centred: bool) -> tuple[Tensor, Tensor]:
    """Singular values of ΔH, falling, and the left singular vector u₁ (D,) of the first, which is a direction of h.

    Few rows are decomposed as they are, many through their second moment (D, D), so that no more is ever held.
    """
    first = next(iter(rows))
    size = first.shape[1]
    if rows.count > size:
        moments = Moments(size)
        for chunk in rows:
            moments.add(chunk)
        values, vectors = moments.principal(centred)
        return values, vectors[:, 0]
    held = torch.cat(list(rows))
    _, values, directions = torch.linalg.svd(held - held.mean(0) if centred else held, full_matrices=False)
    return values[: len(held) - 1] if centred else values, directions[0]


def _recovery(rows: _Rows, mean: Tensor, random: list[Tensor]) -> Recovery:
    """R = 1 − Σ‖δ − v‖ / Σ‖δ‖: 1 if subtracting v gives the base, 0 if it changes nothing, negative if it harms."""
    left = torch.zeros(1 + len(random), dtype=torch.float64)
    whole = 0.0
    for chunk in rows:
        whole += float(chunk.norm(dim=1).sum())
        left += torch.stack([(chunk - v).norm(dim=1).sum() for v in (mean, *random)])
    shares = 1 - left / whole if whole else torch.full_like(left, math.nan)
    return Recovery(float(shares[0]), float(shares[1:].mean()), float(shares[1:].std()))
