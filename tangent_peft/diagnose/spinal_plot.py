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
    """Draws traces over each other, one panel each for α, ℒ and, where there is one, the gradient.

    Args:
        curves: at most eight, of models of one depth.
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
    has_gradient = any(curve.energy is not None for curve in curves)
    labels = ["contraction α", "transport ℒ to the next layer (rad)", "share of the DPO gradient²"]
    with drawing(path, (1 + 3.6 * (2 + has_gradient), 3.8)) as figure:
        panels = figure.subplots(1, 2 + has_gradient, squeeze=False)[0]
        for curve in curves:
            look = styles[curve.name]
            style: dict[str, Any] = {
                "color": look.color,
                "linestyle": look.dash,
                "marker": look.marker,
                "markersize": 3,
            }
            panels[0].plot(range(len(curve.alphas)), curve.alphas, label=curve.name, **style)
            panels[1].plot(range(len(curve.transport)), curve.transport, label=curve.name, **style)
            if curve.energy is not None:
                total = math.fsum(curve.energy) or math.nan
                shares = [value / total for value in curve.energy]
                panels[2].plot(range(1, len(shares) + 1), shares, label=curve.name, **style)
        if not math.isnan(noise):
            panels[0].axhline(noise, color=INK, linestyle=":", linewidth=0.8, label="noise of the same shape")
        for axes, label in zip(panels, labels, strict=False):
            axes.axvspan(block[0] - 0.5, block[1] + 0.5, facecolor="0.92", zorder=0)
            axes.set(xlabel=f"layer (shaded: terminal block {block[0]}–{block[1]})", ylabel=label)
        panels[0].legend()
        note = "reconstruction: fit window, tokens, scaling of the terminal block"
        figure.suptitle(f"{title}\n{note}" if title else note, fontsize=8)
    return [pictures(path)[0]]
