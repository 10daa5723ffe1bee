"""What `steering_vectors` measures: per layer, how much of the shift of the hidden states is one vector.

Holds the numbers, and judges them by the claims of D-STEER (arXiv 2512.11838): a histogram of cosines with its peak in
[0.92, 0.96], σ₂/σ₁ < 0.1, entropy that falls in late layers (22 of 32 on), and inversion that recovers the base. The
limits of 0.85 and of 22/32 of the depth are taken from there; what the paper leaves open is marked as ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from tangent_peft.diagnose.moments import Spectrum
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.evaluate.plots.drawing import INK, PALE, drawing, looks, pictures


BIN_EDGES = np.linspace(-1.0, 1.0, 51)  # one of the bins is the paper's [0.92, 0.96]
PAPER_PEAK = (0.92, 0.96)  # of the histogram of cosines (Fig. 3)
LOW_COSINE = 0.85  # below: not one direction
LOW_RATIO = 0.1  # σ₂/σ₁ below: rank one, by the paper
LATE = 22 / 32  # share of the depth where the paper's entropy drops
FALL = 0.9  # late entropy over early, at most, for a drop; ours
ROUNDING = {"torch.bfloat16": 2**-7, "torch.float16": 2**-10}  # steps of a half precision, of a number's size
FEW = 8  # rows; with fewer nothing is judged


@dataclass(frozen=True)
class Cosines:
    """How cosines are distributed over the rows; NaN if there are none.

    Attributes:
        mean: of the cosines.
        p5: 5th percentile.
        p50: median.
        p95: 95th percentile.
        histogram: how many lie in each bin of `SteeringShift.bins`.
        undefined: rows that have none, because δ or the vector is 0.
    """

    mean: float
    p5: float
    p50: float
    p95: float
    histogram: list[int]
    undefined: int

    @staticmethod
    def of(values: Tensor) -> Cosines:
        """Of cosines (N,), NaN where undefined."""
        known = values[~values.isnan()].double().clamp(-1.0, 1.0).cpu().numpy()
        counts = np.histogram(known, bins=BIN_EDGES)[0].tolist()
        if not len(known):
            return Cosines(math.nan, math.nan, math.nan, math.nan, counts, len(values))
        low, middle, high = (float(value) for value in np.percentile(known, [5, 50, 95]))
        return Cosines(float(known.mean()), low, middle, high, counts, len(values) - len(known))

    @property
    def peak(self) -> tuple[float, float]:
        """The fullest bin, the highest of those that are equally full; NaN if there are no cosines."""
        if not sum(self.histogram):
            return math.nan, math.nan
        place = len(self.histogram) - 1 - int(np.argmax(self.histogram[::-1]))
        return float(BIN_EDGES[place]), float(BIN_EDGES[place + 1])


@dataclass(frozen=True)
class ShiftSpectrum:
    """Singular values of ΔH, and what they say; NaN where all are 0.

    Attributes:
        values: the largest σ, falling.
        ratio: σ₂/σ₁.
        top_energy: σ₁² / Σ σ².
        entropy: −Σ p log p with p = σ²/Σσ², in nats.
        normalized_entropy: the same over its largest possible value.
        effective_rank: e to the entropy.
        entropy_of_sum: −Σ p log p with p = σ/Σσ; the paper does not say which p it takes.
        normalized_entropy_of_sum: the same over its largest possible value.
        effective_rank_of_sum: e to that entropy.
        rank: number of σ above ε σ₁.
    """

    values: list[float]
    ratio: float
    top_energy: float
    entropy: float
    normalized_entropy: float
    effective_rank: float
    entropy_of_sum: float
    normalized_entropy_of_sum: float
    effective_rank_of_sum: float
    rank: float

    @staticmethod
    def of(values: Tensor, epsilon: float, top: int) -> ShiftSpectrum:
        """Of all singular values (K,), falling."""
        if not len(values) or not bool(values[0] > 0):
            return ShiftSpectrum.missing()
        energy, total = Spectrum.of(values), Spectrum.of(values, power=1)
        return ShiftSpectrum(
            energy.values[:top],
            energy.ratio,
            energy.top_energy,
            energy.entropy,
            energy.normalized_entropy,
            energy.effective_rank,
            total.entropy,
            total.normalized_entropy,
            total.effective_rank,
            float(energy.rank(epsilon)),
        )

    @staticmethod
    def missing() -> ShiftSpectrum:
        """No singular values above 0, so no numbers."""
        return ShiftSpectrum([], *[math.nan] * 9)


@dataclass(frozen=True)
class Recovery:
    """Inversion in activations, R = 1 − Σ‖δ − v‖ / Σ‖δ‖ over held-out rows: 1 recovers the base, 0 changes nothing.

    Attributes:
        share: R with v = v⋆.
        control_mean: mean of R with random directions of the same norm.
        control_sd: its standard deviation over their seeds.
    """

    share: float
    control_mean: float
    control_sd: float


@dataclass(frozen=True)
class LayerShift:
    """One layer.

    Attributes:
        layer: ℓ from 1 to L, what leaves block ℓ − 1.
        size: ‖v⋆‖.
        relative_size: ‖v⋆‖ over the mean norm of the base's hidden states there.
        cosines: of δ_i with v⋆, as in the paper; `None` where nothing moves, as in the next two.
        leave_one_out: of δ_i with the mean of the others.
        held_out: of δ of held-out rows with v⋆; `None` if there are none.
        uncentred: of ΔH as in the paper.
        centred: of ΔH less its mean.
        alignment: |cos(u₁, v⋆)|, u₁ of the uncentred ΔH.
        recovery: on held-out rows.
        reason: why there are no numbers; empty if there are.
    """

    layer: int
    size: float
    relative_size: float
    cosines: Cosines | None
    leave_one_out: Cosines | None
    held_out: Cosines | None
    uncentred: ShiftSpectrum
    centred: ShiftSpectrum
    alignment: float
    recovery: Recovery | None
    reason: str


@dataclass(frozen=True)
class SteeringShift(Diagnosis):
    """Result of `steering_vectors`.

    Attributes:
        base: name of the state before.
        tuned: name of the state after.
        position: which tokens δ is of.
        count: N, the rows that v⋆ is the mean of.
        held_out: number of other rows that it is judged on.
        bins: edges of the histograms.
        layers: one entry for each layer from 1 to L.
        settings: model, dtype, evaluation, thresholds, seeds.
    """

    title: ClassVar[str] = "D-STEER: is the shift one vector?"

    base: str
    tuned: str
    position: str
    count: int
    held_out: int
    bins: list[float]
    layers: list[LayerShift]
    settings: dict[str, Any]

    # ---- tables ----------------------------------------------------------------------------------------------------

    def tables(self) -> list[Table]:
        """Cosines and recovery per layer, and the spectra per layer."""
        about = f"{self.base} → {self.tuned}, {self.position}, N = {self.count}, held out {self.held_out}"
        columns = [
            "layer",
            "‖v⋆‖",
            "‖v⋆‖/‖h‖",
            "cos",
            "p5",
            "p50",
            "p95",
            "leave-one-out",
            "held-out cos",
            "R",
            "R random",
            "±",
        ]
        note = (
            "cos: of δ_i with v⋆. Leave-one-out: with the mean of the others. R: recovery of held-out hidden states by "
            "h − v⋆. R random: the same with random directions of the same norm, mean ± sd."
        )
        shift = Table(f"Cosines with v⋆ ({about})", columns, [self._cosine_row(layer) for layer in self.layers], note)
        columns = ["layer", "σ₂/σ₁", "centred", "σ₁²/Σσ²", "centred", "entropy", "normalized", "effective rank"]
        columns += ["rank_ε", "|cos(u₁, v⋆)|"]
        epsilon = self.settings["epsilon"]
        note = f"p = σ²/Σσ² (entropy in nats), ε = {epsilon:g}. Uncentred, as in the paper, where nothing else is said."
        spectra = Table(f"Spectrum of ΔH ({about})", columns, [_spectrum_row(layer) for layer in self.layers], note)
        return [shift, spectra]

    def _cosine_row(self, layer: LayerShift) -> list[Cell]:
        cos, held, found = layer.cosines, layer.held_out, layer.recovery
        usual = [math.nan] * 4 if cos is None else [cos.mean, cos.p5, cos.p50, cos.p95]
        one = math.nan if layer.leave_one_out is None else layer.leave_one_out.mean
        recovery = [math.nan] * 3 if found is None else [found.share, found.control_mean, found.control_sd]
        new = math.nan if held is None else held.mean
        return [layer.layer, layer.size, layer.relative_size, *usual, one, new, *recovery]

    # ---- verdicts --------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[Verdict]:
        """The paper's claims about the last layer, and about late ones, one line each."""
        last = self.layers[-1]
        if last.reason:
            return [Verdict("unknown", f"At the last layer {last.reason}. There is no steering vector to judge.")]
        if self.count < FEW:
            text = f"{self.count} rows are too few to judge the shift by; give at least {FEW}, better 32."
            return [Verdict("unknown", text)]
        step = 0.0 if self.settings["linearized"] else ROUNDING.get(self.settings["dtype"], 0.0)
        if last.relative_size < step:
            text = (
                f"‖v⋆‖ is {last.relative_size:.2%} of ‖h‖ at the last layer, and {self.settings['dtype']} has steps of "
                f"{step:.2%}: δ may be rounding. Load both models in float32 to judge the shift."
            )
            return [Verdict("unknown", text)]
        found = [_cosine_verdict(last, self.count), _rank_verdict(last), _entropy_verdict(self.layers)]
        return [*found, _recovery_verdict(last, self.held_out)]

    # ---- pictures --------------------------------------------------------------------------------------------------

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws the last layer's cosines (`steering_cosines`) and the spectra by layer (`steering_layers`)."""
        label = "".join(letter if letter.isalnum() else "_" for letter in self.position)
        cosines, layers = Path(folder) / f"steering_cosines_{label}", Path(folder) / f"steering_layers_{label}"
        self._plot_cosines(cosines)
        self._plot_layers(layers)
        return [pictures(cosines)[0], pictures(layers)[0]]

    def _plot_cosines(self, path: Path) -> None:
        last = self.layers[-1]
        kinds = {"with v⋆": last.cosines, "leave-one-out": last.leave_one_out, "held-out": last.held_out}
        shown = {name: cosines for name, cosines in kinds.items() if cosines is not None}
        marks = looks(kinds)
        with drawing(path, (5.2, 3.4)) as figure:
            axes = figure.subplots()
            axes.axvspan(*PAPER_PEAK, color=PALE, alpha=0.5, label="peak in the paper")
            axes.axvline(LOW_COSINE, color=INK, linewidth=0.8, linestyle=":")
            for name, cosines in shown.items():
                shares = np.array(cosines.histogram) / max(sum(cosines.histogram), 1)
                axes.stairs(shares, self.bins, color=marks[name].color, linestyle=marks[name].dash, label=name)
            axes.set(
                xlabel="cosine of δ with v⋆", ylabel="share of rows", title=f"{self.tuned}: last layer, {self.position}"
            )
            axes.legend(loc="upper left")

    def _plot_layers(self, path: Path) -> None:
        panels = {
            "normalized entropy": [(s.uncentred.normalized_entropy, s.centred.normalized_entropy) for s in self.layers],
            "σ₂/σ₁": [(s.uncentred.ratio, s.centred.ratio) for s in self.layers],
        }
        marks = looks(["uncentred", "centred"])
        places = [layer.layer for layer in self.layers]
        with drawing(path, (8.0, 3.4)) as figure:
            for axes, (label, values) in zip(figure.subplots(1, 2), panels.items(), strict=True):
                for (name, look), line in zip(marks.items(), zip(*values, strict=True), strict=True):
                    axes.plot(
                        places,
                        line,
                        color=look.color,
                        linestyle=look.dash,
                        marker=look.marker,
                        markersize=3,
                        label=name,
                    )
                axes.axvline(LATE * len(places), color=INK, linewidth=0.8, linestyle=":")
                axes.set(xlabel="layer", ylabel=label)
                axes.set_ylim(bottom=0)
                axes.legend()
            figure.suptitle(f"ΔH of {self.tuned}, {self.position}; dotted: where the paper's entropy drops")


def _spectrum_row(layer: LayerShift) -> list[Cell]:
    usual, centred = layer.uncentred, layer.centred
    return [
        layer.layer,
        usual.ratio,
        centred.ratio,
        usual.top_energy,
        centred.top_energy,
        usual.entropy,
        usual.normalized_entropy,
        usual.effective_rank,
        usual.rank,
        layer.alignment,
    ]


def _cosine_verdict(last: LayerShift, count: int) -> Verdict:
    if last.cosines is None or last.leave_one_out is None or math.isnan(last.leave_one_out.mean):
        return Verdict("unknown", "The cosines with v⋆ are not defined.")
    fair = last.leave_one_out.mean
    low, high = last.cosines.peak
    text = (
        f"Cosine of δ with v⋆ at the last layer: mean {last.cosines.mean:.2f} over {count} rows, leave-one-out "
        f"{fair:.2f}, fullest bin [{low:.2f}, {high:.2f}]; the paper's peak is in [{PAPER_PEAK[0]}, {PAPER_PEAK[1]}]."
    )
    if fair < LOW_COSINE:
        return Verdict("warning", f"{text} Below {LOW_COSINE}: what training did is not one direction here.")
    return Verdict("fine", text)


def _rank_verdict(last: LayerShift) -> Verdict:
    ratio, spread, energy = last.uncentred.ratio, last.centred.ratio, last.centred.top_energy
    rest = f"Less its mean ΔH has {spread:.3f}, and its first direction {energy:.0%} of the energy."
    text = (
        f"σ₂/σ₁ of ΔH at the last layer is {ratio:.3f} uncentred; the paper has < {LOW_RATIO}. "
        f"{'Less its mean nothing of it is left.' if math.isnan(energy) else rest}"
    )
    if ratio < LOW_RATIO:
        return Verdict("fine", f"{text} A low uncentred ratio says little more than that the mean is large.")
    return Verdict("warning", text)


def _entropy_verdict(layers: Sequence[LayerShift]) -> Verdict:
    first = math.ceil(LATE * len(layers))
    moving = [layer for layer in layers if math.isfinite(layer.uncentred.normalized_entropy)]
    early = [layer.uncentred.normalized_entropy for layer in moving if layer.layer < first]
    late = [layer.uncentred.normalized_entropy for layer in moving if layer.layer >= first]
    if min(len(early), len(late)) < 2:
        text = f"Entropy of ΔH: {len(early)} layers before layer {first} and {len(late)} from it on move; too few."
        return Verdict("unknown", text)
    before, after = sum(early) / len(early), sum(late) / len(late)
    text = (
        f"Normalized entropy of ΔH: {before:.2f} before layer {first} of {len(layers)}, {after:.2f} from it on "
        "(the paper: a sharp drop from layer 22 of 32)."
    )
    if after < FALL * before:
        return Verdict("fine", text)
    return Verdict("warning", f"{text} It does not fall, or by less than {1 - FALL:.0%}.")


def _recovery_verdict(last: LayerShift, held_out: int) -> Verdict:
    found = last.recovery
    if found is None:
        return Verdict("unknown", "Inversion was not judged: there are no held-out rows.")
    if math.isnan(found.share):
        return Verdict("unknown", f"Inversion was not judged: every δ of the {held_out} held-out rows is 0.")
    text = (
        f"Inversion, h − v⋆, recovers {found.share:.0%} of the way to the base at the last layer on {held_out} "
        f"held-out rows; random directions of the same norm {found.control_mean:.0%} ± {found.control_sd:.0%}."
    )
    if held_out < FEW:
        return Verdict("unknown", f"{text} Fewer than {FEW} rows: not judged.")
    better = found.share > max(0.0, found.control_mean + 2 * found.control_sd)
    return Verdict("fine" if better and found.share > 0.5 else "warning", text)
