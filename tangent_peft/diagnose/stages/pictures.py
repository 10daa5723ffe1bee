"""Pictures of a `Forgetting`: the objectives over the stages, and the quartiles under both rankings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_peft.evaluate.plots.drawing import INK, PALE, drawing, looks, pictures


if TYPE_CHECKING:
    from tangent_peft.diagnose.stages.forgetting import Forgetting


PANEL = 3.2  # inches
MEASURES = {
    "margin": "DPO-relative margin m",
    "accuracy": "share of pairs with m > 0",
    "policy_margin": "g, nats per token",
}
RANKINGS = {"stage": "ranked by g after the earlier stage", "base": "ranked by the base's g"}


def draw_transfer(result: Forgetting, path: Path) -> Path:
    """Draws every objective's m, accuracy and g over the stages.

    Args:
        result: what to draw.
        path: PNG and SVG, without an ending.

    Returns:
        The PNG file.
    """
    stages = ["base", *result.stages]
    styles = looks(result.pairs)
    with drawing(path, (PANEL * len(MEASURES), PANEL)) as figure:
        for axes, (measure, label) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
            for objective, look in styles.items():
                cells = [result.standing(objective, stage) for stage in stages]
                values = [vars(cell)[measure] for cell in cells]
                errors = [cell.margin_error for cell in cells] if measure == "margin" else None
                axes.errorbar(
                    range(len(stages)),
                    values,
                    yerr=errors,
                    label=objective,
                    marker=look.marker,
                    linestyle=look.dash,
                    color=look.color,
                    capsize=2,
                )
            axes.axhline(0.5 if measure == "accuracy" else 0.0, color=PALE, linewidth=0.8, zorder=0)
            axes.set_xticks(range(len(stages)), [stages[0], *(f"after {stage}" for stage in stages[1:])])
            axes.set_ylabel(label)
        axes.legend(title="objective", frameon=False)
    return pictures(path)[0]


def draw_quartiles(result: Forgetting, path: Path) -> Path:
    """Draws the mean change of g by quartile for every earlier objective, one panel per ranking.

    Args:
        result: what to draw.
        path: PNG and SVG, without an ending.

    Returns:
        The PNG file.
    """
    changes = [change for change in result.forgotten() if change.objective not in result.reasons]
    with drawing(path, (PANEL * 2, PANEL * len(changes))) as figure:
        grid = figure.subplots(len(changes), 2, squeeze=False, sharey="row")
        for row, change in zip(grid, changes, strict=True):
            for axes, (ranking, label) in zip(row, RANKINGS.items(), strict=True):
                place = (change.objective, change.after, ranking)
                found = [q for q in result.quartiles if (q.objective, q.after, q.ranked_by) == place]
                _bars(axes, found)
                axes.set_title(f"{change.objective} after {change.after}\n{label}", fontsize=9)
            row[0].set_ylabel("Δg, nats per token")
    return pictures(path)[0]


def _bars(axes: Any, quartiles: list[Any]) -> None:
    names = [f"Q{q.quartile}" for q in quartiles]
    axes.bar(names, [q.change for q in quartiles], yerr=[q.error for q in quartiles], color=PALE, ecolor=INK, capsize=3)
    axes.axhline(0.0, color=INK, linewidth=0.8)
