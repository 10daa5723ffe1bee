"""A comparison with sequential DPO as text and pictures. Computes no number that is not in the result."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tangent_peft.compare.report import NAMES, table
from tangent_peft.compare.sequential_result import KINDS, SequentialResult
from tangent_peft.evaluate.plots.drawing import INK, PALE, drawing, looks, pictures


TITLES = {
    "margin": "m, the DPO-relative margin",
    "accuracy": "reward accuracy",
    "preference": "implied preference σ(m)",
}


def markdown(result: SequentialResult) -> str:
    """The tables of a result, in Markdown: systems, differences, verdicts on forgetting, gradients, cost."""
    parts = [_systems(result), _differences(result), _verdicts(result), _conflicts(result)]
    return "\n\n".join(parts) + "\n"


def _systems(result: SequentialResult) -> str:
    axes = list(result.settings["axes"])
    rows = []
    for system in result.systems:
        cells = [NAMES[system["source"]].replace(" soup", ""), system["kind"], _arrow(system["name"], axes)]
        cells += [_shown(system[metric][axis]) for axis in axes for metric in TITLES]
        cells.append(f"{min(system['preference'][axis]['mean'] for axis in axes):.3f}")
        rows.append(cells)
    title = (
        "**What each system does to each objective**, on held-out pairs: mean ± standard error over the pairs, of the "
        f"mean of {len(result.settings['seeds'])} seed(s). The base has m = 0 and 0.5 in both others."
    )
    head = ["adapter", "kind", "system", *(f"{axis}: {name}" for axis in axes for name in TITLES), "worst preference"]
    return f"{title}\n\n{table(head, rows)}"


def _arrow(name: str, axes: Sequence[str]) -> str:
    """`help-verb` as `help → verb`."""
    for first in axes:
        if name.startswith(f"{first}-"):
            return f"{first} → {_arrow(name.removeprefix(f'{first}-'), axes)}"
    return name


def _shown(value: Mapping[str, Any], sign: str = "") -> str:
    error = value["error"]
    return f"{value['mean']:{sign}.3f}" + ("" if error is None or error != error else f" ± {error:.3f}")


def _differences(result: SequentialResult) -> str:
    axes = list(result.settings["axes"])
    rows = []
    for found in result.differences:
        cells = [found["combined"], found["sequential"]]
        cells += [_shown(found["preference"][axis], "+") for axis in axes] + [f"{found['preference']['worst']:+.3f}"]
        rows.append(cells)
    title = (
        "**Implied preference, combined minus sequential**, pair by pair; above 0, axes trained apart and combined do "
        "better. Trainings, steps and pairs are as many on both sides."
    )
    return f"{title}\n\n{table(['combined', 'sequential', *axes, 'worst objective'], rows)}"


def _verdicts(result: SequentialResult) -> str:
    lines = ["**What later stages did to the objectives before them**"]
    for found in result.forgetting:
        lines.append(f"\n{NAMES[found['source']]}, {' → '.join(found['order'])}, seed {found['seed']}:\n")
        lines += [f"- *{verdict['finding']}*: {verdict['text']}" for verdict in found["verdicts"]]
    return "\n".join(lines)


def _conflicts(result: SequentialResult) -> str:
    rows = []
    for stage in result.stages:
        moved = stage["movement"] or {}
        rows.append(
            [
                stage["method"],
                " → ".join(stage["trained"]),
                str(stage["seed"]),
                "; ".join(_gradients(stage["conflicts"], previous) for previous in stage["trained"][:-1]),
                *(f"{moved[name]:.3f}" if _finite(moved.get(name)) else "–" for name in ("relative", "cosine")),
                f"{stage['seconds']:.0f} s",
            ]
        )
    head = ["adapter", "stages", "seed", "mean gradient cosine (steps; halves)", "‖Δ₂−Δ₁‖/‖Δ₁‖", "cos(Δ₂−Δ₁, Δ₁)"]
    note = "halves: cosine of two halves of one batch of the earlier objective, what noise leaves of 1."
    return f"**Later stages**; {note}\n\n{table([*head, 'time'], rows)}"


def _gradients(conflicts: Sequence[Mapping[str, Any]], previous: str) -> str:
    """`help: +0.012 (4; +0.300)` of the steps at which the stage's gradient met that of one earlier objective."""
    own = [one for one in conflicts if one["previous"] == previous]
    found = [[one[name] for one in own if _finite(one[name])] for name in ("cosine", "agreement")]
    mean, halves = (f"{sum(values) / len(values):+.3f}" if values else "–" for values in found)
    return f"{previous}: {mean} ({len(found[0])}; {halves})"


def _finite(value: float | None) -> bool:
    """Not so for what does not exist, in a result that was read from its file and in one that was not."""
    return value is not None and math.isfinite(value)


# ---- figures ---------------------------------------------------------------------------------------------------------


def figures(result: SequentialResult, folder: Path) -> list[Path]:
    """Draws the systems in the plane of the first two objectives, and every diagnosis that the result still carries.

    Returns:
        The PNG files.
    """
    made = [_plane(result, folder / "systems")]
    for name, diagnosis in result.diagnoses.items():
        made += diagnosis.plot(folder / name.replace(", ", "-").replace(" → ", "-").replace(" ", "-"))
    return made


def _plane(result: SequentialResult, path: Path) -> Path:
    axes = list(result.settings["axes"])[:2]
    sources = list(dict.fromkeys(system["source"] for system in result.systems))
    styles = looks(KINDS)
    with drawing(path, (3.4 * len(sources), 3.6)) as figure:
        plots = figure.subplots(1, len(sources), squeeze=False, sharex=True, sharey=True)[0]
        for plot, source in zip(plots, sources, strict=True):
            for kind in KINDS:
                chosen = [s for s in result.systems if (s["source"], s["kind"]) == (source, kind)]
                x, y = ([s["preference"][axis]["mean"] for s in chosen] for axis in axes)
                plot.scatter(x, y, marker=styles[kind].marker, color=[styles[kind].color], label=kind)
                for system, place in zip(chosen, zip(x, y, strict=True), strict=True):
                    name = _arrow(system["name"], axes)
                    plot.annotate(name, place, textcoords="offset points", xytext=(4, 4), fontsize=7, color=INK)
            plot.axvline(0.5, color=PALE, linewidth=0.8, zorder=0)
            plot.axhline(0.5, color=PALE, linewidth=0.8, zorder=0)
            plot.margins(0.25)
            plot.set_title(NAMES[source].replace(" soup", ""))
            plot.set_xlabel(f"{axes[0]}: {TITLES['preference']}")
        plots[0].set_ylabel(f"{axes[1]}: {TITLES['preference']}")
        figure.legend(
            *plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS), frameon=False
        )
    return pictures(path)[0]
