"""A comparison as text and pictures: what a reader looks at first. Computes no number that is not in the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tangent_peft.compare.result import CONTROL, REFERENCE, ComparisonResult, deviation
from tangent_peft.compare.scores import BASE
from tangent_peft.compare.settings import mix_key
from tangent_peft.evaluate.plots import FrontCurve, ScoreCurve, plot_control, plot_fronts, plot_parallel, plot_ternary


NAMES = {
    "ts_dpo linearized": "TS-DPO, linearized",
    "ts_dpo merged": "TS-DPO, merged",
    "task_vectors": "Task-Vector DPO",
    "dpo_mixed": "DPO-Mixed",
    "lora_soup": "LoRA soup",
    "mod": "logit mixing (MOD)",
}
TITLES = {"accuracy": "reward accuracy", "preference": "implied preference σ(β·m)", "policy": "policy accuracy"}
TS_DPO = "ts_dpo linearized"  # whose hypervolume the others' are subtracted from


# ---- tables ----------------------------------------------------------------------------------------------------------


def markdown(result: ComparisonResult) -> str:
    """The tables of a result, in Markdown: hypervolumes, control, safety, cosines, cost."""
    parts = [_hypervolumes(result, metric) for metric in result.fronts]
    if any(TS_DPO in name for name in next(iter(result.fronts.values()))["convex"]["of_seed_mean"]["differences"]):
        parts.append(_differences(result))
    parts += [_control(result, metric) for metric in result.control]
    if result.safety:
        parts.append(_safety(result))
    if result.cosine:
        parts.append(_cosines(result))
    parts.append(_cost(result))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _hypervolumes(result: ComparisonResult, metric: str) -> str:
    regimes = result.fronts[metric]
    rows = []
    for source in regimes["all"]["hypervolume"]:
        cells = [NAMES[source]]
        for regime in regimes.values():
            found = regime["hypervolume"][source]
            cells.append(f"{found['mean']:.4f} ± {found['sd']:.4f} ({regime['points'][source]})")
        rows.append(cells)
    number = len(result.settings["seeds"])
    title = (
        f"**Hypervolume, {TITLES[metric]}** above the reference point {REFERENCE:g} in every score (the base model has "
        f"{BASE:g}); mean ± standard deviation over {number} seeds, and the number of mixes."
    )
    head = ["method", *(f"{name}: {regime['regime']}" for name, regime in regimes.items())]
    return f"{title}\n\n{table(head, rows)}"


def _differences(result: ComparisonResult) -> str:
    """Of the convex regime, where every method offers the same mixes."""
    rows = []
    for metric, regimes in result.fronts.items():
        for name, interval in regimes["convex"]["of_seed_mean"]["differences"].items():
            first, second = name.split(" − ")
            if TS_DPO in (first, second):
                sign = 1 if first == TS_DPO else -1
                ends = sorted(sign * interval[end] for end in ("low", "high"))
                other = NAMES[second if sign == 1 else first]
                verdict = "TS-DPO" if ends[0] > 0 else other if ends[1] < 0 else "tie"
                shown = f"{sign * interval['value']:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}]"
                rows.append([TITLES[metric], other, shown, verdict])
    title = (
        "**Hypervolume of linearized TS-DPO minus that of another method**, convex mixes, scores averaged over the "
        "seeds; 95 % bootstrap interval over the held-out pairs. A tie is an interval with 0 in it."
    )
    return f"{title}\n\n{table(['score', 'method', 'difference', 'larger'], rows)}"


def _control(result: ComparisonResult, metric: str) -> str:
    rows = []
    for source, axes in result.control[metric].items():
        for axis, seeds in axes.items():
            near = [seed["near"] for seed in seeds]
            leaks = [leak["change_ratio"] for seed in near for leak in seed["leakage"].values()]
            ratios = [seed["step_ratio"] for seed in near if seed["step_ratio"] is not None]
            rows.append(
                [
                    NAMES[source],
                    axis,
                    f"{_mean(seed['kendall'] for seed in near):.3f}",
                    f"{min(seed['kendall'] for seed in near):.3f}",
                    f"{_mean(seed['kendall'] for seed in (seed['all'] for seed in seeds)):.3f}",
                    f"{_mean(seed['violations'] for seed in near):.0%}",
                    f"{_mean(seed['range'] for seed in near):.3f}",
                    _shown(ratios),
                    _shown([leak for leak in leaks if leak is not None]),
                ]
            )
    title = (
        f"**Control, {TITLES[metric]}**: each axis's λ alone, against its own score; |λ| ≤ {CONTROL:g} unless stated."
    )
    head = ["method", "axis", "Kendall τ", "least of the seeds", "τ, all λ", "violations", "range"]
    return f"{title}\n\n{table([*head, 'steepest / median slope', 'leakage (change of the others / own)'], rows)}"


def _mean(values: Any) -> float:
    return float(np.mean(list(values)))


def _shown(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "–"


def _safety(result: ComparisonResult) -> str:
    rows = []
    for metric, axes in result.safety.items():
        for axis, signs in axes.items():
            if axis == "limits":
                continue
            for sign, seeds in signs.items():
                late, early = sum(map(_late, seeds)), sum(map(_false_alarm, seeds))
                rows.append(
                    [
                        TITLES[metric],
                        axis,
                        "λ > 0" if sign == "positive" else "λ < 0",
                        ", ".join(_weight(seed["flagged"]) for seed in seeds),
                        ", ".join(_weight(seed["collapsed"]) for seed in seeds),
                        f"{late} of {len(seeds)}",
                        f"{early} of {len(seeds)}",
                    ]
                )
    limits = next(iter(result.safety.values()))["limits"]
    title = (
        f"**Safety of merged TS-DPO**: the first |λ| flagged (linearity gap above {limits['gap']:g}, or |λ| above "
        f"{limits['weight']:g}), and the first at which the axis's score has turned down, by seed."
    )
    head = ["score", "axis", "side", "flagged at |λ|", "turned down at |λ|", "turned down unflagged", "flagged in vain"]
    return f"{title}\n\n{table(head, rows)}"


def _late(seed: Mapping[str, Any]) -> bool:
    return seed["collapsed"] is not None and (seed["flagged"] is None or seed["flagged"] > seed["collapsed"])


def _false_alarm(seed: Mapping[str, Any]) -> bool:
    return seed["flagged"] is not None and seed["collapsed"] is None


def _weight(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"


def _cosines(result: ComparisonResult) -> str:
    axes = list(result.settings["axes"])
    rows = []
    for source, seeds in result.cosine.items():
        for first, second in ((i, j) for i in range(len(axes)) for j in range(i + 1, len(axes))):
            values = [matrix[first][second] for matrix in seeds]
            rows.append(
                [NAMES[source].split(",")[0], f"{axes[first]}, {axes[second]}", ", ".join(f"{v:+.3f}" for v in values)]
            )
    return f"**Cosine of the axes** in weight space, by seed.\n\n{table(['method', 'axes', 'cosine'], rows)}"


def _cost(result: ComparisonResult) -> str:
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for training in result.trainings:
        by_method.setdefault(training["method"], []).append(training)
    names = {**NAMES, "ts_dpo": "TS-DPO"}
    rows = []
    for method, found in by_method.items():
        seconds, parameters = [one["seconds"] for one in found], found[0]["trained_parameters"]
        runs = len(found) / len(result.settings["seeds"])
        rows.append([names[method], f"{runs:g}", f"{parameters / 1e6:.1f} M", f"{np.median(seconds):.0f} s"])
    head = ["method", "trainings per seed", "trained parameters", "median time of a training"]
    return f"**Trainings**, timed while other jobs ran beside them.\n\n{table(head, rows)}"


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(result: ComparisonResult, folder: Path) -> list[Path]:
    """Draws fronts, scores against λ and, for three axes, the simplex; PNG and SVG of each.

    Args:
        result: of a comparison.
        folder: where to save.

    Returns:
        The PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    axes, made = list(result.settings["axes"]), []
    for metric in result.fronts:
        table = _Points(result, metric)
        if len(axes) == 2:
            made.append(_draw_fronts(table, axes, folder / f"front-{metric}"))
        else:
            made += _draw_simplex(table, axes, folder, metric)
    for metric in result.control:
        table = _Points(result, metric)
        made += [_draw_control(table, axis, folder / f"control-{metric}-{axis}") for axis in axes]
    return made


class _Points:
    """Mean scores over the seeds: by source, the mixes and their scores (M, K)."""

    def __init__(self, result: ComparisonResult, metric: str) -> None:
        self.metric, self.axes = metric, list(result.settings["axes"])
        grouped: dict[str, dict[Any, list[Mapping[str, Any]]]] = {}
        for point in result.points:
            grouped.setdefault(point["source"], {}).setdefault(mix_key(point["weights"]), []).append(point)
        self.mixes = {source: [points[0]["weights"] for points in found.values()] for source, found in grouped.items()}
        self.scores = {
            source: np.array(
                [[_mean(p[metric][axis] for p in points) for axis in self.axes] for points in found.values()]
            )
            for source, found in grouped.items()
        }
        self.deviations = {
            source: np.array(
                [[deviation([p[metric][axis] for p in points]) for axis in self.axes] for points in found.values()]
            )
            for source, found in grouped.items()
        }


def _draw_fronts(table: _Points, axes: Sequence[str], path: Path) -> Path:
    curves = {}
    for source, scores in table.scores.items():
        weights = [mix.get(axes[0], 0.0) for mix in table.mixes[source]]
        keep = [row for row, mix in enumerate(table.mixes[source]) if abs(sum(mix.values()) - 1) < 1e-9]
        curves[NAMES[source]] = FrontCurve(scores[keep], np.array(weights)[keep])
    labels = [f"{axis}: {TITLES[table.metric]}" for axis in axes]
    title = "Mixes whose λ add up to 1, mean of the seeds"
    return plot_fronts(curves, labels, path, weight=f"λ of {axes[0]}", reference=[REFERENCE] * 2, title=title)[0]


def _draw_control(table: _Points, axis: str, path: Path) -> Path:
    panels: dict[str, dict[str, ScoreCurve]] = {}
    for source, scores in table.scores.items():
        if source == "dpo_mixed":
            continue
        rows = [row for row, mix in enumerate(table.mixes[source]) if not set(mix) - {axis}]
        rows.sort(key=lambda row: table.mixes[source][row].get(axis, 0.0))
        weights = [table.mixes[source][row].get(axis, 0.0) for row in rows]
        for column, name in enumerate(table.axes):
            spread = table.deviations[source][rows, column]
            values = scores[rows, column]
            curve = ScoreCurve(weights, values, np.stack([values - spread, values + spread], 1))
            panels.setdefault(f"{name}: {TITLES[table.metric]}", {})[NAMES[source]] = curve
    title = f"λ of {axis} alone; bars: standard deviation over the seeds"
    return plot_control(panels, path, weight=f"λ of {axis}", title=title)[0]


def _draw_simplex(table: _Points, axes: Sequence[str], folder: Path, metric: str) -> list[Path]:
    made, fronts = [], {}
    labels = [f"{axis}: {TITLES[metric]}" for axis in axes]
    for source, scores in table.scores.items():
        places = np.array([[mix.get(axis, 0.0) for axis in axes] for mix in table.mixes[source]])
        keep = (np.abs(places.sum(1) - 1) < 1e-9) & (places >= 0).all(1)
        fronts[NAMES[source]] = scores[keep]
        if len(axes) == 3 and keep.sum() > 4:
            path = folder / f"simplex-{metric}-{source.replace(' ', '-')}"
            columns = dict(zip(labels, scores[keep].T, strict=True))
            made.append(plot_ternary(places[keep], columns, axes, path, title=f"{NAMES[source]}, mean of the seeds")[0])
    made.append(plot_parallel(fronts, labels, folder / f"parallel-{metric}", title="Non-dominated convex mixes")[0])
    return made
