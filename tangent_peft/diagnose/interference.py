"""Do axes interfere? What each one adds to the hidden states of the same prompts, compared pair by pair.

The shift of an axis is exact, J·τ by one dual forward (`shift="tangent"`), or the difference h(θ₀ + τ) − h(θ₀) of the
two networks (`shift="weights"`), which is what TS-DPO (arXiv 2602.01128, §4.4) compares for ordinary DPO. Shifts are
taken from the residual stream before the final norm; a tangent on the head lies above it and has no part in them.
Layer, token and number of directions are not in the paper: they are chosen here, and stand in the result.

Two tangents of one model share its Jacobian, so their shifts go together across prompts to some degree whatever the
axes are. Beside a pair of axes put an axis of random τ (`init_weights=False`) to see how much of it that is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tangent_peft.diagnose.activations import check_layer, decoder_blocks, layer_states, layer_tangents, row_means
from tangent_peft.diagnose.interference_plots import plot_correlations, plot_depth
from tangent_peft.diagnose.overlap import ENERGY, PERMUTATIONS, Overlap, check_overlap_settings, shift_overlap
from tangent_peft.diagnose.prompts import TokenBatch, answer_batches, prompt_batches
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.diagnose.spool import Spool
from tangent_peft.diagnose.states import ModelState
from tangent_peft.diagnose.threshold import COSINE_LIMIT, NOT_ALONE, is_entangled
from tangent_peft.tuner.axes import check_known, refuse_saved_modules, tangent_tuner


SIGNIFICANT = 0.05  # of the permutation test


@dataclass(frozen=True)
class InterferenceSettings:
    """How shifts are taken and compared.

    Attributes:
        layers: 0 is what enters the first block, ℓ what leaves block ℓ − 1; negative ones count from the end.
        position: the last token of the prompt, or the mean over the tokens of the chosen answer.
        shift: J·τ, or the difference of the networks' states at the weights θ₀ + τ and θ₀.
        components: principal directions to keep at most; `None`: min(d, N/5).
        energy: share of the variance to keep.
        permutations: random pairings for the chance level.
        seed: of the pairings.
        batch_size: prompts per forward.
    """

    layers: tuple[int, ...] = (-1,)
    position: Literal["prompt", "answer"] = "prompt"
    shift: Literal["tangent", "weights"] = "tangent"
    components: int | None = None
    energy: float = ENERGY
    permutations: int = PERMUTATIONS
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("`layers` is empty. Name at least one, such as -1 for the last.")
        if self.position not in ("prompt", "answer"):
            raise ValueError(f"position={self.position!r}; it is 'prompt' or 'answer'.")
        if self.shift not in ("tangent", "weights"):
            raise ValueError(f"shift={self.shift!r}; it is 'tangent' or 'weights'.")


@dataclass(frozen=True)
class AxisOverlap:
    """The shifts of two axes at one layer.

    Attributes:
        first: name of an axis.
        second: name of the other.
        layer: its index.
        norms: mean over the prompts of the length of each one's shift.
        overlap: what the shifts have in common.
    """

    first: str
    second: str
    layer: int
    norms: tuple[float, float]
    overlap: Overlap

    @property
    def name(self) -> str:
        """Both axes."""
        return f"{self.first} – {self.second}"


@dataclass(frozen=True)
class Interference(Diagnosis):
    """Result of `axis_interference`.

    Attributes:
        axes: names of the axes.
        prompts: N.
        layers: the layers looked at, of 0 to `last_layer`.
        last_layer: L, the number of blocks.
        dtype: of the model.
        settings: as given.
        pairs: each pair of axes at each layer.
    """

    title: ClassVar[str] = "Interference of axes: shifts of hidden states on the same prompts"

    axes: list[str]
    prompts: int
    layers: list[int]
    last_layer: int
    dtype: str
    settings: InterferenceSettings
    pairs: list[AxisOverlap]

    def tables(self) -> list[Table]:
        """Cosines and CKA; canonical correlations beside chance."""
        return [self._cosines(), self._correlations()]

    def _setting(self) -> str:
        where = "last prompt token" if self.settings.position == "prompt" else "mean over the chosen answer's tokens"
        what = "J·τ" if self.settings.shift == "tangent" else "h(θ₀ + τ) − h(θ₀)"
        return f"Shift {what} at the {where}, N = {self.prompts}, {self.dtype}; layers are 0 to {self.last_layer}."

    def _cosines(self) -> Table:
        rows: list[list[Cell]] = []
        for p in self.pairs:
            low, _, high = p.overlap.cosine_quantiles
            cosines = [p.overlap.cosine, low, high, p.overlap.cosine_of_means]
            rows.append([p.name, p.layer, *p.norms, *cosines, p.overlap.cka_debiased, p.overlap.cka])
            rows[-1] += p.overlap.mean_share
        columns = ["axes", "layer", "‖first‖", "‖second‖", "cosine", "5 %", "95 %", "of means", "CKA", "biased CKA"]
        note = (
            f"{self._setting()} cosine: mean over the prompts, with quantiles. CKA: linear, debiased; the published "
            "form beside it is near 1 for N below d. mean share: energy of the shifts that is the same for every "
            "prompt; CKA and CCA see only the rest."
        )
        return Table("Functional cosine and CKA", [*columns, "mean share 1st", "mean share 2nd"], rows, note)

    def _correlations(self) -> Table:
        rows: list[list[Cell]] = []
        for p in self.pairs:
            c = p.overlap.cca
            largest = c.correlations[0] if c.correlations else math.nan
            found: list[Cell] = [largest, c.mean, c.null_mean, c.null_95, c.p_value, *c.pwcca, c.area, c.reason]
            rows.append([p.name, p.layer, *c.directions, *found])
        columns = ["axes", "layer", "k 1st", "k 2nd", "ρ₁", "mean ρ", "by chance", "95 %", "p"]
        note = (
            f"Shifts centred and reduced to {self.settings.energy:.0%} of their variance, at most "
            f"{self.settings.components or 'min(d, N/5)'} directions. By chance: "
            f"{self.settings.permutations} random pairings of the prompts, seed {self.settings.seed}. PWCCA: weighted "
            "by the first and by the second axis. area: ∫ρ over the spectrum on [0, 1]."
        )
        return Table("Canonical correlations", [*columns, "PWCCA 1st", "PWCCA 2nd", "area", "reason"], rows, note)

    def verdicts(self) -> list[Verdict]:
        """A line on the cosine and one on the correlations of each pair at the last of the layers."""
        last = max(self.layers)
        found = []
        for pair in self.pairs:
            if pair.layer == last:
                found += [_cosine_verdict(pair), _correlation_verdict(pair)]
        return found

    def plot(self, folder: str | Path) -> list[Path]:
        """`interference_correlations.png`, and with several layers `interference_depth.png`.

        Args:
            folder: where to save.

        Raises:
            ImportError: if matplotlib is missing.
        """
        drawn = [plot_correlations(Path(folder) / "interference_correlations", self._spectra())]
        if len(self.layers) > 1:
            drawn.append(plot_depth(Path(folder) / "interference_depth", self._overlaps()))
        return drawn

    def _overlaps(self) -> dict[str, dict[int, Overlap]]:
        found: dict[str, dict[int, Overlap]] = {}
        for pair in self.pairs:
            found.setdefault(pair.name, {})[pair.layer] = pair.overlap
        return found

    def _spectra(self) -> dict[str, dict[int, Overlap]]:
        """The lowest, middle and highest of the layers, which is as many spectra as a panel can show."""
        chosen = {self.layers[0], self.layers[len(self.layers) // 2], self.layers[-1]}
        return {
            name: {layer: overlap for layer, overlap in by_layer.items() if layer in chosen}
            for name, by_layer in self._overlaps().items()
        }


def _cosine_verdict(pair: AxisOverlap) -> Verdict:
    cosine, where = pair.overlap.cosine, f"{pair.name} at layer {pair.layer}"
    if math.isnan(cosine):
        still = " and ".join(
            repr(name) for name, norm in zip((pair.first, pair.second), pair.norms, strict=True) if not norm
        )
        return Verdict("unknown", f"{where}: {still} does not move this layer, so there is no cosine of the shifts.")
    low, _, high = pair.overlap.cosine_quantiles
    text = f"{where}: the shifts have a mean cosine of {cosine:.2f} (90 % of prompts {low:.2f} to {high:.2f})"
    if is_entangled(cosine):
        way = "push the same way" if cosine > 0 else "push against each other"
        return Verdict(
            "warning",
            f"{text}, beyond ±{COSINE_LIMIT}: the axes {way}, so λ of one moves what the other is for. Look at pairs "
            "that serve both axes, or project one axis off the other (`orthogonalize_axis`).",
        )
    return Verdict("fine", f"{text}, within ±{COSINE_LIMIT}. {NOT_ALONE}")


def _correlation_verdict(pair: AxisOverlap) -> Verdict:
    c, where = pair.overlap.cca, f"{pair.name} at layer {pair.layer}"
    if c.reason:
        return Verdict("unknown", f"{where}: no canonical correlations, {c.reason}.")
    text = f"{where}: mean canonical correlation {c.mean:.2f} over {min(c.directions)} directions"
    if math.isnan(c.p_value):
        return Verdict("unknown", f"{text}; without random pairings it can not be set against chance.")
    text += f", {c.null_mean:.2f} by chance (p = {c.p_value:.3f})"
    if c.p_value > SIGNIFICANT:
        return Verdict("fine", f"{text}: no more than unrelated shifts have.")
    return Verdict(
        "unknown",
        f"{text}: the shifts vary together across prompts. Tangents of one model do so to some degree whatever the "
        "axes are; compare with an axis of random τ before reading interference into it.",
    )


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def axis_interference(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    data: Sequence[Any],
    axes: Sequence[str] | None = None,
    settings: InterferenceSettings | None = None,
) -> Interference:
    """Compares what axes add to the hidden states of the same prompts.

    One forward per axis and batch, and one of the base for `shift="weights"`. Shifts lie in a temporary file of
    N · layers · d · 4 bytes per axis; memory does not grow with the number of prompts.

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
        spools: dict[str, Spool] = {}
        for batch in _batches(tokenizer, data, settings, base):
            for name, shifts in _shifts(model, names, batch, settings.shift):
                rows = row_means(shifts[layers], batch.keep).transpose(0, 1)
                if name not in spools:
                    spools[name] = stack.enter_context(Spool(tuple(rows.shape[1:])))
                spools[name].append(rows)
        for (first, second), (place, layer) in itertools.product(itertools.combinations(names, 2), enumerate(layers)):
            both = [spools[name].array()[:, place] for name in (first, second)]
            overlap = shift_overlap(
                *both,
                components=settings.components,
                energy=settings.energy,
                permutations=settings.permutations,
                seed=settings.seed,
            )
            norms = (_mean_norm(spools[first], place), _mean_norm(spools[second], place))
            pairs.append(AxisOverlap(first, second, layer, norms, overlap))
            del both
    dtype = str(base.root.dtype).removeprefix("torch.")
    return Interference(names, len(data), layers, last, dtype, settings, pairs)


def _batches(
    tokenizer: PreTrainedTokenizerBase, data: Sequence[Any], settings: InterferenceSettings, base: ModelState
) -> Iterator[TokenBatch]:
    if settings.position == "answer":
        return answer_batches(tokenizer, data, settings.batch_size, base.device)
    return prompt_batches(tokenizer, data, settings.batch_size, base.device)


def _shifts(
    model: torch.nn.Module, names: Sequence[str], batch: TokenBatch, shift: str
) -> Iterator[tuple[str, Tensor]]:
    """What each axis adds at every layer (L + 1, n, D)."""
    if shift == "tangent":
        for name in names:
            with ModelState.mix(model, {name: 1.0}, linearized=True).active() as root:
                yield name, layer_tangents(root, batch.inputs, batch.keep)[1]
        return
    with ModelState.mix(model, {}).active() as root:
        before = layer_states(root, batch.inputs, batch.keep)
    for name in names:
        with ModelState.mix(model, {name: 1.0}, linearized=False).active() as root:
            yield name, layer_states(root, batch.inputs, batch.keep) - before


def _mean_norm(spool: Spool, place: int) -> float:
    total = sum(float(chunk[:, place].double().norm(dim=1).sum()) for chunk in spool.chunks())
    return total / spool.count
