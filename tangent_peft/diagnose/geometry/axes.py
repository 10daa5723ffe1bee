"""The geometry of axes: cosines, norms, ranks and principal angles of τ, over all modules and in each one.

Nothing is run: all of this is read off the weights ΔW = τ, one layer at a time. The cosine is that of TS-DPO's check of
whether axes are disentangled (arXiv 2602.01128); that it does not predict interference is found in arXiv 2608.09490, so
`interference.py` and the non-additivity R(λ) stand beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from tangent_peft.diagnose.geometry.axes_plots import plot_cosines, plot_modules, plot_overlaps, plot_spectra
from tangent_peft.diagnose.geometry.places import Cells, Place, grouped, place_of, stack_of
from tangent_peft.diagnose.geometry.subspaces import Angles, Directions, Ranks, by_matrix, leading
from tangent_peft.diagnose.interference.overlap import mean_known
from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.diagnose.threshold import COSINE_LIMIT, NOT_ALONE, is_entangled
from tangent_peft.tuner.algebra import axis_gram, layer_factors
from tangent_peft.tuner.axes import check_known, tangent_layers, tangent_tuner
from tangent_peft.tuner.weights import TangentFactors


ENERGY = 0.9
KEPT_VALUES = 64  # singular values of a module in the result; all of them are in its ranks
KEPT_ANGLES = 16
LISTED = 8  # modules in the table of the most aligned ones


@dataclass(frozen=True)
class ModuleAxis:
    """An axis at one module.

    Attributes:
        place: the module.
        axis: name of the axis.
        form: `"dense"` or `"low rank"`.
        shape: (out, in) of ΔW.
        ranks: its norm and its singular values.
    """

    place: Place
    axis: str
    form: str
    shape: tuple[int, int]
    ranks: Ranks


@dataclass(frozen=True)
class ModulePair:
    """Two axes at one module that both wrap.

    Attributes:
        place: the module.
        first: name of an axis.
        second: name of the other.
        norms: ‖ΔW‖ and ‖ΔW'‖.
        cosine: ⟨ΔW, ΔW'⟩ over both; NaN if one is zero.
        columns: angles between what they write, the leading column directions of each.
        rows: angles between what they read, the leading row directions of each.
        shared_rows: both read through one projection A, so their whole row spaces coincide by construction, and
            `rows` compares leading directions inside of it.
    """

    place: Place
    first: str
    second: str
    norms: tuple[float, float]
    cosine: float
    columns: Angles
    rows: Angles
    shared_rows: bool


@dataclass(frozen=True)
class AxisGeometry(Diagnosis):
    """Result of `axis_geometry`.

    Attributes:
        axes: names of the axes.
        cosines: (K, K) over all modules; NaN where an axis is zero.
        ranks: of each axis, of ΔW of all its modules as one block-diagonal matrix.
        energy: share of ‖ΔW‖² in the leading directions and in the ranks at a share.
        directions: leading directions per module, if they were given in place of the share.
        modules: each axis at each module.
        pairs: each pair of axes at each module that both wrap.
        kept_apart: modules that axes keep whole (`modules_to_save`), which are not part of τ; by axis.
    """

    title: ClassVar[str] = "Geometry of axes: cosines, norms, ranks and angles of τ"

    axes: list[str]
    cosines: list[list[float]]
    ranks: list[Ranks]
    energy: float
    directions: int | None
    modules: list[ModuleAxis]
    pairs: list[ModulePair]
    kept_apart: dict[str, list[str]]

    def tables(self) -> list[Table]:
        """Axes, their cosines, each pair by kind of module, and the modules in which axes are most alike."""
        found = [self._axes()]
        if len(self.axes) > 1:
            found += [self._cosines(), self._kinds(), self._most_alike()]
        return found

    def _axes(self) -> Table:
        rows: list[list[Cell]] = []
        for axis, r in zip(self.axes, self.ranks, strict=True):
            forms = sorted({m.form for m in self.modules if m.axis == axis})
            count = sum(m.axis == axis for m in self.modules)
            rows.append([axis, ", ".join(forms), count, r.norm, r.possible, r.effective, r.stable, r.energy, r.top])
        columns = ["axis", "form", "matrices", "‖τ‖", "possible rank", "effective", "stable"]
        note = (
            "Of all ΔW as one block-diagonal matrix. effective: e^H of the energy shares σ²/Σσ²; stable: Σσ²/σ₁²; "
            f"{self.energy:.0%}: directions that hold so much of the energy; top: σ₁²/Σσ²."
        )
        return Table("Axes", [*columns, f"{self.energy:.0%}", "top"], rows, note)

    def _cosines(self) -> Table:
        rows: list[list[Cell]] = [[axis, *row] for axis, row in zip(self.axes, self.cosines, strict=True)]
        return Table("Cosines of τ, over all modules", ["axis", *self.axes], rows)

    def _kinds(self) -> Table:
        rows: list[list[Cell]] = []
        for names, pairs in self._by_pair().items():
            for kind in dict.fromkeys(p.place.kind for p in pairs):
                of_kind = [p for p in pairs if p.place.kind == kind]
                spread = [p.cosine for p in of_kind if not math.isnan(p.cosine)]
                ends: list[Cell] = [min(spread), max(spread)] if spread else [None, None]
                cosine = _joint_cosine(of_kind)
                rows.append([" – ".join(names), kind, len(of_kind), cosine, *ends, *_overlaps(of_kind)])
        columns = ["axes", "module", "count", "cosine", "least", "most", "columns", "by chance", "rows", "by chance"]
        leading = f"{self.directions} leading" if self.directions else f"the {self.energy:.0%} leading"
        note = (
            "cosine: of all modules of a kind together, with the least and the most of any one. columns, rows: mean "
            f"cos² of the principal angles between {leading} directions that the two axes write and read; by chance: "
            "for random subspaces of these dimensions."
        )
        shared = sum(p.shared_rows for p in self.pairs)
        if shared:
            note += (
                f" In {shared} of {len(self.pairs)} cases both axes read through one projection A: their row spaces "
                "coincide by construction, and `rows` compares directions inside of it, with chance to match."
            )
        return Table("Pairs of axes by kind of module", columns, rows, note)

    def _most_alike(self) -> Table:
        known = [p for p in self.pairs if not math.isnan(p.cosine)]
        rows: list[list[Cell]] = []
        for p in sorted(known, key=lambda p: -abs(p.cosine))[:LISTED]:
            column = p.columns.angles[0] if p.columns.angles else None
            row = p.rows.angles[0] if p.rows.angles else None
            rows.append([f"{p.first} – {p.second}", p.place.name, p.cosine, column, row])
        columns = ["axes", "module", "cosine", "least angle, columns (°)", "least angle, rows (°)"]
        return Table("Modules in which axes are most alike", columns, rows)

    def _by_pair(self) -> dict[tuple[str, str], list[ModulePair]]:
        found: dict[tuple[str, str], list[ModulePair]] = {}
        for pair in self.pairs:
            found.setdefault((pair.first, pair.second), []).append(pair)
        return found

    def verdicts(self) -> list[Verdict]:
        """A line for each pair of axes, and one for each axis that is more than its τ."""
        places_of = self._by_pair()
        found = []
        for (i, first), (j, second) in itertools.combinations(enumerate(self.axes), 2):
            found.append(_verdict(first, second, self.cosines[i][j], places_of.get((first, second), [])))
        for axis, kept in self.kept_apart.items():
            text = f"{axis!r} keeps its own copy of {kept}, which are not part of τ and are not counted here."
            found.append(Verdict("unknown", text))
        return found

    def plot(self, folder: str | Path) -> list[Path]:
        """Heat maps over kinds of modules and blocks, and spectra.

        Args:
            folder: where to save `geometry_modules` (norms, effective ranks), `geometry_spectra`, and with two axes or
                more `geometry_cosines` and `geometry_overlaps`.

        Raises:
            ImportError: if matplotlib is missing.
        """
        target = Path(folder)
        norms: dict[str, Cells] = {axis: {} for axis in self.axes}
        ranks: dict[str, Cells] = {axis: {} for axis in self.axes}
        for axis in self.axes:
            for cell, held in grouped([m for m in self.modules if m.axis == axis]).items():
                norms[axis][cell] = math.sqrt(sum(m.ranks.norm**2 for m in held))
                ranks[axis][cell] = mean_known([m.ranks.effective for m in held])
        drawn = [
            plot_modules(target / "geometry_modules", norms, ranks),
            plot_spectra(target / "geometry_spectra", {a: self._spectra(a) for a in self.axes}),
        ]
        if self.pairs:
            drawn += self._draw_pairs(target)
        return drawn

    def _draw_pairs(self, target: Path) -> list[Path]:
        cosines: dict[str, Cells] = {}
        columns: dict[str, Cells] = {}
        rows: dict[str, Cells] = {}
        for names, pairs in self._by_pair().items():
            name, cells = " – ".join(names), grouped(pairs)
            cosines[name] = {cell: _joint_cosine(held) for cell, held in cells.items()}
            means = {cell: _overlaps(held) for cell, held in cells.items()}
            columns[name] = {cell: found[0] - found[1] for cell, found in means.items()}
            rows[name] = {cell: found[2] - found[3] for cell, found in means.items()}
        return [
            plot_cosines(target / "geometry_cosines", cosines),
            plot_overlaps(target / "geometry_overlaps", columns, rows),
        ]

    def _spectra(self, axis: str) -> list[list[float]]:
        return [m.ranks.values for m in self.modules if m.axis == axis and m.ranks.norm]


def _joint_cosine(pairs: Sequence[ModulePair]) -> float:
    """The cosine over several modules together."""
    inner = sum(p.cosine * p.norms[0] * p.norms[1] for p in pairs if not math.isnan(p.cosine))
    first, second = (math.sqrt(sum(p.norms[side] ** 2 for p in pairs)) for side in (0, 1))
    return inner / (first * second) if first and second else math.nan


def _overlaps(pairs: Sequence[ModulePair]) -> tuple[float, float, float, float]:
    """Mean overlap and its chance level, of columns and of rows."""
    columns, rows = [p.columns for p in pairs], [p.rows for p in pairs]
    return (
        mean_known([a.overlap for a in columns]),
        mean_known([a.chance for a in columns]),
        mean_known([a.overlap for a in rows]),
        mean_known([a.chance for a in rows]),
    )


def _verdict(first: str, second: str, cosine: float, pairs: Sequence[ModulePair]) -> Verdict:
    if math.isnan(cosine):
        return Verdict("unknown", f"{first} – {second}: one of the two has τ = 0, so there is no cosine. Train it.")
    text = f"{first} – {second}: cos(τ, τ') = {cosine:.3f}"
    beyond = [p for p in pairs if is_entangled(p.cosine)]
    largest = max(beyond, key=lambda p: abs(p.cosine), default=None)
    modules = f"{len(beyond)} of {len(pairs)} modules are beyond ±{COSINE_LIMIT}"
    modules += f", most {largest.place.name} ({largest.cosine:.2f})" if largest else ""
    if not pairs:
        return Verdict("fine", f"{text}: no module carries both axes. {NOT_ALONE}")
    if is_entangled(cosine):
        way = "point the same way" if cosine > 0 else "point against each other"
        return Verdict(
            "warning",
            f"{text} is beyond ±{COSINE_LIMIT}: the axes are not disentangled, they {way}; {modules}. Look for pairs "
            "that serve both axes and at the learning rate, or project one off the other (`orthogonalize_axis`).",
        )
    return Verdict("fine", f"{text} is within ±{COSINE_LIMIT}; {modules}. {NOT_ALONE}")


# ---- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def axis_geometry(
    model: nn.Module,
    axes: Sequence[str] | None = None,
    energy: float = ENERGY,
    directions: int | None = None,
) -> AxisGeometry:
    """Measures τ of some axes, at λ = 1, a layer at a time.

    A low-rank ΔW is measured by its factors and never formed; of a dense one the larger side is read in pieces.

    Args:
        model: a `PeftModel` with tangent axes, of any forms; what is active does not matter. Each of fused experts
            counts as a matrix of its own. All processes of a sharded model call this together.
        axes: names; `None`: all of them. One axis has norms and ranks, and no pairs.
        energy: share of ‖ΔW‖² in the leading directions whose angles are taken, and in the ranks at a share.
        directions: leading directions per module, in place of the share.

    Returns:
        Cosines, ranks, and each module's norms, spectra and angles.

    Raises:
        TypeError: if the model carries no tangent axes.
        ValueError: for an unknown axis or one named twice, a tangent that is not finite, a share outside of (0, 1], or
            fewer than one direction.
    """
    tuner = tangent_tuner(model)
    names = list(tuner.peft_config) if axes is None else list(axes)
    check_known(tuner, names)
    _check(names, energy, directions)
    gram = axis_gram(model, names)
    norms = gram.diagonal().sqrt()
    modules: list[ModuleAxis] = []
    pairs: list[ModulePair] = []
    values: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    several = len({stack_of(layer.layer_name) for layer in tangent_layers(model)} - {None}) > 1
    for layer, factors in layer_factors(model, names):
        split = {name: by_matrix(found) for name, found in factors.items()}
        count = len(next(iter(split.values())))
        for index in range(count):
            place = place_of(layer.layer_name, index if layer.leading else None, several)
            matrices = {name: parts[index] for name, parts in split.items()}
            found = {name: leading(matrix, energy, directions) for name, matrix in matrices.items()}
            for name, taken in found.items():
                values[name].append(taken.values.cpu())
                modules.append(_module(place, name, matrices[name], taken, energy))
            for first, second in itertools.combinations(found, 2):
                held = {name: (matrices[name], found[name]) for name in (first, second)}
                pairs.append(_pair(place, held))
    kept_apart = {name: list(tuner.peft_config[name].modules_to_save or ()) for name in names}
    return AxisGeometry(
        axes=names,
        cosines=(gram / norms / norms[:, None]).tolist(),
        ranks=[Ranks.of(torch.cat(values[name]), energy, KEPT_VALUES) for name in names],
        energy=energy,
        directions=directions,
        modules=modules,
        pairs=pairs,
        kept_apart={name: kept for name, kept in kept_apart.items() if kept},
    )


def _check(names: Sequence[str], energy: float, count: int | None) -> None:
    if not names or len(set(names)) < len(names):
        raise ValueError(f"axes={list(names)} names no axis, or one twice. Give each one once.")
    if not 0.0 < energy <= 1.0:
        raise ValueError(f"energy={energy} is a share of ‖ΔW‖², above 0 and at most 1.")
    if count is not None and count < 1:
        raise ValueError(f"directions={count}; give at least one leading direction, or None to take them by energy.")


def _module(place: Place, name: str, matrix: TangentFactors, taken: Directions, energy: float) -> ModuleAxis:
    form = "low rank" if matrix.dense is None else "dense"
    shape = (taken.left.shape[0], taken.right.shape[0])
    return ModuleAxis(place, name, form, shape, Ranks.of(taken.values, energy, KEPT_VALUES))


def _pair(place: Place, held: dict[str, tuple[TangentFactors, Directions]]) -> ModulePair:
    (first, (x, u)), (second, (y, v)) = held.items()
    norms = (math.sqrt(float(x.square_norm())), math.sqrt(float(y.square_norm())))
    cosine = float(x.inner(y)) / (norms[0] * norms[1]) if min(norms) else math.nan
    shared = x.a is not None and y.a is not None and torch.equal(x.a, y.a)
    room = x.a.shape[0] if shared and x.a is not None else u.right.shape[0]
    columns = Angles.between(u.left, v.left, u.left.shape[0], KEPT_ANGLES)
    rows = Angles.between(u.right, v.right, room, KEPT_ANGLES)
    return ModulePair(place, first, second, norms, cosine, columns, rows, shared)
