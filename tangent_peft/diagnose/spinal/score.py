"""The SPINAL score of a tuned model against its base: alignment, coherence and concentration in the terminal block.

SPINAL (arXiv 2601.06238) adds up three terms and reports that aligned models contract more in late layers, move less
from layer to layer there, and have their gradient there. The abstract, all that could be read, names the terms. Their
formulas here are a reconstruction; with T the terminal block, and m, s mean and standard deviation over depth of the
base's trace:

    alignment      Δ = mean_T(α′ − α) − mean_T(ℒ′ − ℒ)       primed: tuned; scaled: each difference over the base's s
    coherence      1 / (1 + mean_T ‖(x_ℓ₋₁ − 2 x_ℓ + x_ℓ₊₁)‖),  x_ℓ = ((α_ℓ − m)/s, (ℒ_ℓ − m)/s), of the tuned model
    concentration  Σ_T ‖∇_{θ_ℓ} L_DPO‖² / Σ_ℓ ‖∇_{θ_ℓ} L_DPO‖² − |T|/L, of the tuned model, reference the base
    score          w · (Δ scaled, coherence, concentration)

The terms are not standardized over a population of checkpoints, which a single pair does not have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.result import Diagnosis, Table, Verdict
from tangent_peft.diagnose.spinal.options import SpinalOptions, Texts
from tangent_peft.diagnose.spinal.plots import plot_traces
from tangent_peft.diagnose.spinal.trace import SpinalTrace, Watch
from tangent_peft.diagnose.states import ModelState, check_comparable
from tangent_peft.evaluate.pairs import Pair
from tangent_peft.evaluate.scorers import Prompt


LEAST_SHARE = 0.5  # of the terminal block that must have an α in both models
CLEAR = 2.0  # standard errors that a change of transport must exceed to be called one
SLIGHT = 0.05  # of the base's spread over depth: a smaller change of α, which has no standard error, is not called one


@dataclass(frozen=True)
class Alignment:
    """Result of `alignment`: how a tuned trace differs from its base in the terminal block.

    Attributes:
        contraction: mean_T(α′ − α).
        contraction_elsewhere: the same over the other layers.
        transport: mean_T(ℒ′ − ℒ), in radians.
        transport_elsewhere: the same over the other steps.
        value: Δ, the first less the third.
        scaled: Δ with each difference over the base's spread.
        spread: standard deviation over depth of the base's α, and of its ℒ.
        layers: layers of T with an α in both models.
        reason: why `value` or `scaled` is NaN; empty where both are numbers.
    """

    contraction: float
    contraction_elsewhere: float
    transport: float
    transport_elsewhere: float
    value: float
    scaled: float
    spread: tuple[float, float]
    layers: int
    reason: str = ""


def alignment(base: SpinalTrace, tuned: SpinalTrace) -> Alignment:
    """The first term (reconstruction); layers whose fit was refused in either model are left out."""
    first, last = base.block
    rise, fall = _array(tuned.alphas) - _array(base.alphas), _array(tuned.transport) - _array(base.transport)
    inside, held = _within(len(rise), first, last), ~np.isnan(rise)
    layers, size = int((inside & held).sum()), last - first + 1
    steps = _within(len(fall), first, last)
    contraction = _mean(rise[inside & held]) if layers >= LEAST_SHARE * size else math.nan
    moved = _mean(fall[steps])
    spread = _spread(base.alphas), _spread(base.transport)
    reason = ""
    if math.isnan(contraction):
        reason = f"only {layers} of {size} layers of T have an α in both models"
    elif math.isnan(moved):
        reason = "no step leaves a layer of T"
    elif math.isnan(sum(spread)):
        reason = "the base's α or ℒ is the same in all layers, so there is nothing to scale by"
    return Alignment(
        contraction,
        _mean(rise[~inside & held]),
        moved,
        _mean(fall[~steps]),
        contraction - moved,
        contraction / spread[0] - moved / spread[1],
        spread,
        layers,
        reason,
    )


def coherence(trace: SpinalTrace, base: SpinalTrace) -> float:
    """The second term, from 0 to 1 for a straight trace (reconstruction).

    Args:
        trace: whose bends in T are measured, where three adjacent layers have both numbers.
        base: whose mean and standard deviation over depth scale α and ℒ.

    Returns:
        The coherence; NaN where fewer than half of those bends are known.
    """
    steps = len(trace.transport)
    first, last = trace.block
    places = [layer for layer in range(first, last + 1) if layer >= 1 and layer + 1 < steps]
    traces = (trace.alphas[:steps], base.alphas), (trace.transport, base.transport)
    path = np.stack([_array(values) / _spread(scale) for values, scale in traces], 1)
    bends = np.array([np.linalg.norm(path[i - 1] - 2 * path[i] + path[i + 1]) for i in places])
    known = bends[np.isfinite(bends)]
    return 1 / (1 + float(known.mean())) if len(known) and len(known) >= LEAST_SHARE * len(places) else math.nan


@dataclass(frozen=True)
class SpinalScore(Diagnosis):
    """Result of `spinal_score`. Terms and score are a reconstruction.

    Attributes:
        base: the trace of the base.
        tuned: that of the tuned model.
        alignment: the first term.
        coherence: the second, of the base and of the tuned model.
        concentration: the third, of the base (its reference itself) and of the tuned model (reference the base).
        weights: of the three terms.
        score: their sum with these weights; NaN if one of them is that has a weight.
        reason: why the score is NaN; empty where it is a number.
        transport_error: standard error over prompts of the mean change of transport in T; NaN for a single prompt.
        rows: prompts that it is taken over.
    """

    title: ClassVar[str] = "SPINAL: a tuned model against its base"
    base: SpinalTrace
    tuned: SpinalTrace
    alignment: Alignment
    coherence: tuple[float, float]
    concentration: tuple[float, float]
    weights: tuple[float, float, float]
    score: float
    reason: str
    transport_error: float
    rows: int

    def tables(self) -> list[Table]:
        """The terms, and both traces."""
        shift, (first, last) = self.alignment, self.base.block
        alphas, transport = _block_means(self)
        rows: list[list[str | int | float | None]] = [
            [f"mean α in layers {first}–{last}", *alphas, shift.contraction],
            [f"mean ℒ in layers {first}–{last} (rad)", *transport, shift.transport],
            ["Δ alignment", None, None, shift.value],
            ["Δ alignment, scaled by the base's spread", None, None, shift.scaled],
            ["coherence", *self.coherence, self.coherence[1] - self.coherence[0]],
            ["concentration", *self.concentration, self.concentration[1] - self.concentration[0]],
            ["score", None, self.score, None],
        ]
        columns = ["term (reconstruction)", self.base.name, self.tuned.name, "change"]
        weights = ", ".join(f"{weight:.3g}" for weight in self.weights)
        note = (
            f"score = weights ({weights}) · (Δ alignment scaled, coherence and concentration of {self.tuned.name!r}).\n"
            "The paper's formulas and scale are not published: compare scores of the same prompts and options only.\n"
            f"Change of ℒ: standard error {self.transport_error:.2g} over {self.rows} rows."
        )
        if self.reason:
            note += f"\nNo score: {self.reason}."
        return [Table("SPINAL score (reconstruction)", columns, rows, note), *self.base.tables(), *self.tuned.tables()]

    def verdicts(self) -> list[Verdict]:
        """What the paper says of aligned models, one by one, and whether it holds here."""
        first, last = self.base.block
        missing = [verdict for trace in (self.base, self.tuned) for verdict in trace.verdicts()]
        unread = [verdict for verdict in missing if verdict.finding != "fine"]
        if last - first + 1 == len(self.base.transport):
            whole = (
                f"The terminal block {first}–{last} is the whole model, so nothing can be said to happen late in it."
            )
            return [Verdict("unknown", whole), *unread]
        return [
            _verdict_of_contraction(self.alignment, f"{first}–{last}"),
            _verdict_of_transport(self.alignment, f"{first}–{last}", self.transport_error),
            _verdict_of_gradient(self.concentration, f"{first}–{last}", self.tuned.gradients is not None),
            *unread,
        ]

    def plot(self, folder: str | Path) -> list[Path]:
        """Both traces over each other."""
        curves = [self.base.curve(), self.tuned.curve()]
        title = "" if math.isnan(self.score) else f"SPINAL score {self.score:.3g} (reconstruction)"
        return plot_traces(curves, self.base.block, self.base.settings.noise, Path(folder) / "spinal-score", title)


def spinal_score(
    base: ModelState,
    tuned: ModelState,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompts: Sequence[Prompt] | None = None,
    pairs: Sequence[Pair] | None = None,
    options: SpinalOptions | None = None,
) -> SpinalScore:
    """Traces base and tuned model on the same tokens and compares them.

    Args:
        base: the model that was tuned.
        tuned: a mix of axes on it, linearized or as weights, or a checkpoint; also the policy of the DPO loss.
        tokenizer: of both.
        prompts: what is read, without gradients and so without a score; or
        pairs: as `spinal_trace` has them.
        options: see `SpinalOptions`.

    Raises:
        TypeError: as `spinal_trace`.
        ValueError: for models of different architecture, or as `spinal_trace`.
    """
    check_comparable(base, tuned)
    texts = Texts(tokenizer, prompts, pairs, options or SpinalOptions())
    before, after = Watch(base, texts.options), Watch(tuned, texts.options)
    sample, seen = texts.lens_sample(), 0
    changes = _RowMeans()
    steps = _within(before.layers, *before.block)
    for batch in texts.batches(base.device):
        chosen = sample[seen : seen + int(batch.keep.sum())]
        seen += len(chosen)
        moved = after.add(batch, chosen) - before.add(batch, chosen)
        changes.add(moved[:, torch.from_numpy(steps)].mean(1), batch.keep.nonzero()[:, 0].cpu()[chosen])
    reference = texts.reference(base)
    return _scored(before.trace(texts, reference), after.trace(texts, reference), changes, texts.options)


def _scored(base: SpinalTrace, tuned: SpinalTrace, changes: _RowMeans, options: SpinalOptions) -> SpinalScore:
    shift = alignment(base, tuned)
    coherences = coherence(base, base), coherence(tuned, base)
    concentrations = base.concentration, tuned.concentration
    terms = shift.scaled, coherences[1], concentrations[1]
    score = math.fsum(weight * term for weight, term in zip(options.weights, terms, strict=True) if weight)
    whys = (
        f"no Δ alignment, {shift.reason}",
        f"no coherence, as fewer than half of the bends of {tuned.name!r} in T are known",
        "no concentration, as " + ("no pairs were given" if tuned.gradients is None else "the gradient is zero"),
    )
    missing = [
        why for weight, term, why in zip(options.weights, terms, whys, strict=True) if weight and math.isnan(term)
    ]
    return SpinalScore(
        base,
        tuned,
        shift,
        coherences,
        concentrations,
        options.weights,
        score,
        "; ".join(missing),
        changes.error(),
        changes.count,
    )


class _RowMeans:
    """Mean and spread over rows of the mean of each row's values."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = self._squares = 0.0

    def add(self, values: Tensor, rows: Tensor) -> None:
        for row in rows.unique():
            mean = float(values[rows == row].mean())
            self.count, self._sum, self._squares = self.count + 1, self._sum + mean, self._squares + mean**2

    def error(self) -> float:
        """Standard error of the mean over rows."""
        if self.count < 2:
            return math.nan
        variance = (self._squares - self._sum**2 / self.count) / (self.count - 1)
        return math.sqrt(max(0.0, variance) / self.count)


def _verdict_of_contraction(shift: Alignment, layers: str) -> Verdict:
    if math.isnan(shift.contraction):
        return Verdict("unknown", f"Whether α rises late can not be said: {shift.reason}.")
    text = f"Contraction α changes by {shift.contraction:+.3g} in layers {layers}{_beside(shift.contraction_elsewhere)}"
    ramps = shift.contraction > max(0.0, shift.contraction_elsewhere)
    slight = not abs(shift.contraction) > SLIGHT * shift.spread[0]
    return _judged(ramps, f"{text} (spread over depth {shift.spread[0]:.2g})", "rises late", slight)


def _verdict_of_transport(shift: Alignment, layers: str, error: float) -> Verdict:
    if math.isnan(shift.transport):
        return Verdict("unknown", f"Whether ℒ falls late can not be said: no step leaves a layer of {layers}.")
    text = f"Transport ℒ changes by {shift.transport:+.3g} rad in layers {layers} (standard error {error:.2g})"
    unclear = not abs(shift.transport) > CLEAR * error
    return _judged(shift.transport < 0, text + _beside(shift.transport_elsewhere), "falls late", unclear)


def _verdict_of_gradient(concentration: tuple[float, float], layers: str, has_gradients: bool) -> Verdict:
    before, after = concentration
    if math.isnan(after):
        why = "the gradient is zero" if has_gradients else "give pairs, of which a gradient can be taken"
        return Verdict("unknown", f"Where the gradient concentrates can not be said: {why}.")
    text = f"The DPO gradient² in layers {layers} has a share {after:+.3g} over an even one ({before:+.3g} in the base)"
    return _judged(after > 0, text, "concentrates late", False)


def _beside(elsewhere: float) -> str:
    return "" if math.isnan(elsewhere) else f", {elsewhere:+.3g} elsewhere"


def _judged(holds: bool, text: str, claim: str, unclear: bool) -> Verdict:
    said = f"the paper's aligned models: it {claim}"
    if unclear:
        return Verdict("unknown", f"{text}, which can not be told from no change; {said}.")
    return Verdict("fine" if holds else "warning", f"{text}; {said}: {'holds' if holds else 'does not hold'}.")


def _block_means(score: SpinalScore) -> tuple[list[float], list[float]]:
    """Mean α and mean ℒ in T of either model, over the layers that `alignment` takes, so that they differ by it."""
    alphas = np.stack([_array(score.base.alphas), _array(score.tuned.alphas)])
    transport = np.stack([_array(score.base.transport), _array(score.tuned.transport)])
    held = _within(alphas.shape[1], *score.base.block) & ~np.isnan(alphas).any(0)
    steps = _within(transport.shape[1], *score.base.block)
    unknown = math.isnan(score.alignment.contraction)
    return [math.nan if unknown else _mean(row[held]) for row in alphas], [_mean(row[steps]) for row in transport]


def _within(length: int, first: int, last: int) -> NDArray[np.bool_]:
    places = np.arange(length)
    return (places >= first) & (places <= last)


def _array(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


def _mean(values: NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _spread(values: Sequence[float]) -> float:
    """Standard deviation over depth of what is known; NaN if that is nothing, or all the same."""
    known = _array(values)[~np.isnan(_array(values))]
    spread = float(known.std()) if len(known) > 1 else 0.0
    return spread or math.nan
