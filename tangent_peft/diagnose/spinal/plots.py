"""Pictures of SPINAL traces: contraction, transport and gradient by depth, the terminal block shaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tangent_peft.evaluate.plots.drawing import INK, drawing, looks, pictures


@dataclass(frozen=True)
class Curve:
    """What is drawn of a trace.

    Attributes:
        name: of the state.
        alphas: α (L + 1,); NaN leaves a gap.
        transport: ℒ (L,).
        energy: squared gradient (L,) by block, drawn as shares; or `None`.
    """

    name: str
    alphas: Sequence[float]
    transport: Sequence[float]
    energy: Sequence[float] | None = None


def plot_traces(
    curves: Sequence[Curve], block: tuple[int, int], noise: float, path: Path, title: str = ""
) -> list[Path]:
    """Draws traces over each other, a panel each for α, ℒ and, where there is one, the gradient; of two the change too.

    Args:
        curves: at most eight, of models of one depth; of two, the second less the first is drawn below.
        block: first and last layer of the terminal block.
        noise: α of noise of the same shape, a dotted line; NaN leaves it out.
        path: where to save; written as .png and as .svg.
        title: first line above the panels.

    Returns:
        The PNG file, in a list.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: for no curves, or too many.
    """
    styles = looks(curve.name for curve in curves)
    traces = [_panels(curve) for curve in curves]
    columns, rows = max(map(len, traces)), 2 if len(curves) == 2 else 1
    with drawing(path, (1 + 3.6 * columns, 1.2 + 2.6 * rows)) as figure:
        grid = figure.subplots(rows, columns, squeeze=False, sharex="col")
        for curve, panels in zip(curves, traces, strict=True):
            look = styles[curve.name]
            style: dict[str, Any] = {
                "color": look.color,
                "linestyle": look.dash,
                "marker": look.marker,
                "markersize": 3,
            }
            for axes, (layers, values) in zip(grid[0], panels, strict=False):
                axes.plot(layers, values, label=curve.name, **style)
        if not math.isnan(noise):
            grid[0][0].axhline(noise, color=INK, linestyle=":", linewidth=0.8, label="noise of the same shape")
        if rows == 2:
            for axes, (layers, before), (_, after) in zip(grid[1], *traces, strict=False):
                change = [new - old for old, new in zip(before, after, strict=True)]
                axes.bar(layers, change, color=styles[curves[1].name].color)
                axes.axhline(0, color=INK, linewidth=0.6)
                axes.set(ylabel="change")
        for axes, label in zip(grid[0], LABELS, strict=False):
            axes.set(ylabel=label)
        for axes in grid.flat:
            axes.axvspan(block[0] - 0.5, block[1] + 0.5, facecolor="0.92", zorder=0)
        for axes in grid[-1]:
            axes.set(xlabel=f"layer (shaded: terminal block {block[0]}–{block[1]})")
        grid[0][0].legend()
        note = "reconstruction: fit window, tokens, scaling of the terminal block"
        figure.suptitle(f"{title}\n{note}" if title else note, fontsize=8)
    return [pictures(path)[0]]


LABELS = ("contraction α", "transport ℒ to the next layer (rad)", "share of the DPO gradient²")


def _panels(curve: Curve) -> list[tuple[list[int], list[float]]]:
    """Layers and values of each panel of a trace."""
    panels = [(list(range(len(values))), list(values)) for values in (curve.alphas, curve.transport)]
    if curve.energy is not None:
        total = math.fsum(curve.energy) or math.nan
        panels.append((list(range(1, len(curve.energy) + 1)), [value / total for value in curve.energy]))
    return panels
