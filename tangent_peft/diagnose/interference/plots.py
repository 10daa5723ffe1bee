"""Pictures of shifts: canonical correlations beside chance, and what changes with depth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tangent_peft.diagnose.interference.overlap import Overlap
from tangent_peft.evaluate.plots.drawing import DASHES, INK, MARKERS, PALE, color_map, drawing, pictures


MOST_PANELS = 9
ByLayer = Mapping[str, Mapping[int, Overlap]]  # overlaps by pair of axes and layer


def plot_correlations(path: Path, pairs: ByLayer) -> Path:
    """ρ against its number, a panel for each pair and a line for each layer, over the 95 % quantile of chance.

    Args:
        path: where to save.
        pairs: overlaps by pair of axes and layer; the first nine pairs are drawn.

    Returns:
        The PNG file.
    """
    shown = dict(list(pairs.items())[:MOST_PANELS])
    with drawing(path, panel_size(len(shown))) as figure:
        for axes, (name, by_layer) in zip(panels(figure, len(shown)), shown.items(), strict=True):
            colors = color_map()
            for index, (layer, overlap) in enumerate(by_layer.items()):
                color = colors(0.8 * index / max(1, len(by_layer) - 1))
                cca, style = overlap.cca, DASHES[index % len(DASHES)]
                places = range(1, len(cca.correlations) + 1)
                marker = MARKERS[index % len(MARKERS)] if len(cca.correlations) < 40 else None
                label = f"layer {layer}"
                axes.plot(places, cca.correlations, color=color, linestyle=style, marker=marker, ms=3, label=label)
                if cca.null_spectrum:
                    axes.plot(places, cca.null_spectrum, color=PALE, linestyle=style, linewidth=1.2)
            axes.plot([], [], color=PALE, label="95 % of random pairings")
            axes.set(xlabel="number of the canonical direction", ylabel="canonical correlation ρ", ylim=(0, 1.03))
            axes.set_title(name)
            axes.legend()
        figure.suptitle("Canonical correlations of the shifts")
    return pictures(path)[0]


def plot_depth(path: Path, pairs: ByLayer, controls: Mapping[str, Mapping[int, tuple[float, ...]]]) -> Path:
    """Mean cosine, debiased CKA and mean ρ against the layer, with those of controls; a panel for each pair.

    Args:
        path: where to save.
        pairs: overlaps by pair of axes and layer; the first nine pairs are drawn.
        controls: the same three numbers of controls.

    Returns:
        The PNG file.
    """
    shown = dict(list(pairs.items())[:MOST_PANELS])
    colors = color_map()
    with drawing(path, panel_size(len(shown))) as figure:
        for axes, (name, by_layer) in zip(panels(figure, len(shown)), shown.items(), strict=True):
            layers, found = list(by_layer), list(by_layer.values())
            lines: dict[str, list[float]] = {
                "mean cosine": [overlap.cosine for overlap in found],
                "CKA, debiased": [overlap.cka_debiased for overlap in found],
                "mean ρ": [overlap.cca.mean for overlap in found],
            }
            for index, (label, values) in enumerate(lines.items()):
                look: dict[str, Any] = {"marker": MARKERS[index], "linestyle": DASHES[index], "ms": 4}
                axes.plot(layers, values, color=colors(0.4 * index), label=label, **look)
                control = [controls[name][layer][index] for layer in layers]
                axes.plot(layers, control, color=colors(0.4 * index), alpha=0.45, mfc="none", **look)
            axes.plot([], [], color=INK, alpha=0.45, marker="o", mfc="none", ms=4, label="pale: controls")
            axes.plot(layers, [overlap.cca.null_mean for overlap in found], color=PALE, label="mean ρ by chance")
            axes.axhline(0.0, color=INK, linewidth=0.6)
            axes.set(xlabel="layer (0 enters the first block)", ylim=(-1.03, 1.03), title=name)
            axes.legend()
        figure.suptitle("Shifts of the hidden states against depth")
    return pictures(path)[0]


def panel_size(count: int) -> tuple[float, float]:
    """Inches of a picture of so many panels, three in a row."""
    return 4.2 * min(3, max(1, count)), 3.4 * -(-max(1, count) // 3)


def panels(figure: Any, count: int) -> list[Any]:
    """The axes of so many panels, three in a row; places that stay empty are hidden."""
    columns = min(3, max(1, count))
    grid = figure.subplots(-(-max(1, count) // columns), columns, squeeze=False).flatten().tolist()
    for unused in grid[count:]:
        unused.set_axis_off()
    return grid[:count]
