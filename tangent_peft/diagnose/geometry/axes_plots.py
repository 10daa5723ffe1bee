"""Pictures of axes: heat maps over kinds of modules and blocks, and spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tangent_peft.diagnose.geometry.places import Cells
from tangent_peft.diagnose.interference.plots import MOST_PANELS
from tangent_peft.evaluate.plots.drawing import COLORS, DASHES, PALE, color_map, drawing, pictures


SIGNED = "PuOr_r"  # orange above zero, violet below: told apart by color-blind readers too


def plot_cosines(path: Path, pairs: Mapping[str, Cells]) -> Path:
    """The cosine of two axes in every module, a panel for each pair; the first nine pairs.

    Args:
        path: where to save.
        pairs: cosines by kind and block, by pair of axes.

    Returns:
        The PNG file.
    """
    shown = dict(list(pairs.items())[:MOST_PANELS])
    limit = _limit(shown.values(), 0.3)
    panels = [(f"cosine, {name}", cells, SIGNED, (-limit, limit)) for name, cells in shown.items()]
    return _maps(path, panels, "Cosines of τ by module")


def plot_overlaps(path: Path, columns: Mapping[str, Cells], rows: Mapping[str, Cells]) -> Path:
    """How far the leading directions of two axes overlap beyond chance, in what they write and in what they read.

    Args:
        path: where to save.
        columns: mean cos² of the principal angles minus that of random subspaces, by kind and block, by pair.
        rows: the same of what the axes read.

    Returns:
        The PNG file.
    """
    names = list(columns)[:MOST_PANELS]
    limit = _limit([held[name] for name in names for held in (columns, rows)], 0.1)
    panels = []
    for name in names:
        panels.append((f"written, {name}", columns[name], SIGNED, (-limit, limit)))
        panels.append((f"read, {name}", rows[name], SIGNED, (-limit, limit)))
    return _maps(path, panels, "Overlap of leading directions, minus chance")


def plot_modules(path: Path, norms: Mapping[str, Cells], ranks: Mapping[str, Cells]) -> Path:
    """‖ΔW‖ and effective rank of every axis in every module.

    Args:
        path: where to save.
        norms: by kind and block, by axis; the first nine axes.
        ranks: likewise.

    Returns:
        The PNG file.
    """
    panels = []
    for axis in list(norms)[:MOST_PANELS]:
        panels.append((f"‖ΔW‖, {axis}", norms[axis], COLORS, _range(norms[axis])))
        panels.append((f"effective rank, {axis}", ranks[axis], COLORS, _range(ranks[axis])))
    return _maps(path, panels, "Axes by module")


def plot_spectra(path: Path, spectra: Mapping[str, Sequence[Sequence[float]]]) -> Path:
    """Singular values of ΔW over the largest one, a line for each module and the median of an axis above them.

    Args:
        path: where to save.
        spectra: the leading singular values of each module, by axis.

    Returns:
        The PNG file.
    """
    colors = color_map()
    with drawing(path, (6.0, 4.0)) as figure:
        axes = figure.subplots()
        for index, (axis, modules) in enumerate(spectra.items()):
            color = colors(0.85 * index / max(1, len(spectra) - 1))
            scaled = [np.asarray(values) / values[0] for values in modules]
            for values in scaled:
                axes.plot(range(1, len(values) + 1), values, color=color, alpha=0.12, linewidth=0.7)
            if scaled:
                length = int(np.median([len(values) for values in scaled]))
                median = np.median([v[:length] for v in scaled if len(v) >= length], axis=0)
                style = DASHES[index % len(DASHES)]
                axes.plot(range(1, length + 1), median, color=color, linestyle=style, linewidth=2.0, label=axis)
        axes.set(xlabel="number of the singular value", ylabel="σ / σ₁", ylim=(0, 1.03), title="Spectra of ΔW")
        axes.legend(title="median of the modules")
    return pictures(path)[0]


def _limit(cells: Any, least: float) -> float:
    values = [abs(value) for held in cells for value in held.values() if not math.isnan(value)]
    return max([least, *values])


def _range(cells: Cells) -> tuple[float, float]:
    values = [value for value in cells.values() if not math.isnan(value)]
    return 0.0, max(values, default=1.0) or 1.0


def _maps(path: Path, panels: Sequence[tuple[str, Cells, str, tuple[float, float]]], title: str) -> Path:
    """Heat maps, two in a row: kinds of modules down, blocks across, what is in no block in the last column."""
    kinds = list(dict.fromkeys(kind for _, cells, _, _ in panels for kind, _ in cells))
    found = {block for _, cells, _, _ in panels for _, block in cells}
    blocks = [*sorted(block for block in found if block is not None), *([None] if None in found else [])]
    across, shared = min(2, len(panels)), len({limits for *_, limits in panels}) == 1
    down = -(-len(panels) // across)
    size = (across * (2.6 + 0.22 * max(8, len(blocks))), 0.6 + down * (1.1 + 0.2 * max(4, len(kinds))))
    with drawing(path, size) as figure:
        grid = figure.subplots(down, across, squeeze=False).flatten().tolist()
        for axes, (name, cells, colors, limits) in zip(grid, panels, strict=False):
            values = np.array([[cells.get((kind, block), math.nan) for block in blocks] for kind in kinds])
            image = axes.imshow(values, cmap=colors, vmin=limits[0], vmax=limits[1], aspect="auto")
            axes.set_facecolor(PALE)  # where an axis has no tangent
            labels = ["–" if block is None else str(block) for block in blocks]
            axes.set_xticks(range(len(blocks)), labels, fontsize=7)
            axes.set_yticks(range(len(kinds)), kinds if axes in grid[::across] else [""] * len(kinds), fontsize=7)
            axes.set(title=name, xlabel="block (–: none)")
            if not shared:
                figure.colorbar(image, ax=axes)
        for unused in grid[len(panels) :]:
            unused.set_axis_off()
        if shared:
            figure.colorbar(image, ax=grid)
        figure.suptitle(title)
    return pictures(path)[0]
