"""What a comparison of the shifts of axes gives: settings, numbers, tables, verdicts. `interference.py` measures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from tangent_peft.diagnose.interference.overlap import ENERGY, PERMUTATIONS, Overlap, mean_known
from tangent_peft.diagnose.interference.plots import plot_correlations, plot_depth
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.diagnose.threshold import COSINE_LIMIT, NOT_ALONE, is_entangled


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
        controls: compare with controls of the axes, for one more forward per axis and batch.
        seed: of the pairings and the controls.
        batch_size: prompts per forward.
    """

    layers: tuple[int, ...] = (-1,)
    position: Literal["prompt", "answer"] = "prompt"
    shift: Literal["tangent", "weights"] = "tangent"
    components: int | None = None
    energy: float = ENERGY
    permutations: int = PERMUTATIONS
    controls: bool = True
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
class ControlOverlap:
    """The shift of one axis beside that of a control of another.

    Attributes:
        cosine: mean over the prompts.
        cka_debiased: linear CKA.
        correlation: mean ρ.
    """

    cosine: float
    cka_debiased: float
    correlation: float


@dataclass(frozen=True)
class AxisOverlap:
    """The shifts of two axes at one layer.

    Attributes:
        first: name of an axis.
        second: name of the other.
        layer: its index.
        norms: mean over the prompts of the length of each one's shift.
        overlap: what the shifts have in common.
        control: the same numbers of the first axis with a control of the second, and of a control of the first with the
            second; empty without controls.
    """

    first: str
    second: str
    layer: int
    norms: tuple[float, float]
    overlap: Overlap
    control: list[ControlOverlap]

    @property
    def name(self) -> str:
        """Both axes."""
        return f"{self.first} – {self.second}"

    def controls(self) -> ControlOverlap:
        """The mean of the controls; NaN without."""
        return ControlOverlap(
            mean_known([c.cosine for c in self.control]),
            mean_known([c.cka_debiased for c in self.control]),
            mean_known([c.correlation for c in self.control]),
        )


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
            cosines = [p.overlap.cosine, low, high, p.controls().cosine, p.overlap.cosine_of_means]
            ckas = [p.overlap.cka_debiased, p.controls().cka_debiased, p.overlap.cka]
            rows.append([p.name, p.layer, *p.norms, *cosines, *ckas, *p.overlap.mean_share])
        columns = ["axes", "layer", "‖first‖", "‖second‖", "cosine", "5 %", "95 %", "control", "of means"]
        columns += ["CKA", "control", "biased CKA"]
        note = (
            f"{self._setting()} cosine: mean over the prompts, with quantiles. CKA: linear, debiased; the published "
            "form (biased) is near 1 for N below d. control: with the same τ writing in random directions. mean "
            "share: energy of the shifts that is the same for every prompt; CKA and CCA see only the rest."
        )
        return Table("Functional cosine and CKA", [*columns, "mean share 1st", "mean share 2nd"], rows, note)

    def _correlations(self) -> Table:
        rows: list[list[Cell]] = []
        for p in self.pairs:
            c = p.overlap.cca
            largest = c.correlations[0] if c.correlations else math.nan
            found: list[Cell] = [largest, c.mean, p.controls().correlation, c.null_mean, c.null_95, c.p_value]
            found += [*c.pwcca, c.area, c.reason]
            rows.append([p.name, p.layer, *c.directions, *found])
        columns = ["axes", "layer", "k 1st", "k 2nd", "ρ₁", "mean ρ", "control", "by chance", "95 %", "p"]
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
            controls: dict[str, dict[int, tuple[float, ...]]] = {}
            for pair in self.pairs:
                mean = pair.controls()
                numbers = (mean.cosine, mean.cka_debiased, mean.correlation)
                controls.setdefault(pair.name, {})[pair.layer] = numbers
            drawn.append(plot_depth(Path(folder) / "interference_depth", self._overlaps(), controls))
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
    controls = [control.correlation for control in pair.control if not math.isnan(control.correlation)]
    if not controls:
        return Verdict(
            "unknown",
            f"{text}: the shifts vary together across prompts. Tangents of one model do so whatever the axes are; only "
            "controls (`controls=True`) tell whether these do so more.",
        )
    text += f", {min(controls):.2f} to {max(controls):.2f} with controls"
    if c.mean <= max(controls):
        return Verdict("fine", f"{text}: no more than with the same τ writing in random directions.")
    return Verdict(
        "unknown",
        f"{text}: the shifts vary together across prompts more than those of controls, by "
        f"{c.mean - max(controls):.2f}. No published limit says when that is too much: look at R(λ) of the mix.",
    )
