"""Pictures of linearity: gaps and KL against λ, the range of one axis, and heat maps of non-additivity."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tangent_peft.evaluate.plots.drawing import INK, PALE, color_map, drawing, looks, number


if TYPE_CHECKING:
    from tangent_peft.diagnose.linearity.additivity import Additivity, PairAdditivity
    from tangent_peft.diagnose.linearity.profile import LinearityProfile
    from tangent_peft.diagnose.linearity.safe_range import SafeRange


def file_name(axis: str) -> str:
    """The name of an axis as a part of a file's name."""
    return re.sub(r"[^\w-]", "_", axis)


def plot_profile(profile: LinearityProfile, path: Path) -> Path:
    """Gaps at the left, KL at the right, a look for each axis; log-probs and the linearized model are dashed.

    Args:
        profile: what to draw.
        path: of the PNG.

    Returns:
        `path`.
    """
    marks = looks(profile.axes)
    with drawing(path, (8.6, 3.8)) as figure:
        from matplotlib.lines import Line2D

        left, right = figure.subplots(1, 2)
        for axis, look in marks.items():
            points = [point for point in profile.of(axis) if point.weight]
            for sign in (-1, 1):
                side = [point for point in points if point.weight * sign > 0]
                places = [point.weight for point in side]
                style = {"color": look.color, "marker": look.marker, "markersize": 4, "linewidth": 1.4}
                left.plot(places, [point.gap for point in side], "-", **style)
                left.plot(places, [point.gap_log_probs for point in side], "--", alpha=0.6, **style)
                right.plot(places, [_positive(point.kl) for point in side], "-", **style)
                right.plot(places, [_positive(point.kl_linearized) for point in side], "--", alpha=0.6, **style)
        left.axhline(profile.limit, color=PALE, linewidth=1.2, zorder=0)
        left.set(xlabel="λ", ylabel="linearity gap", title="solid: logits, dashed: log-probs")
        left.set_ylim(bottom=0.0)
        right.set(xlabel="λ", ylabel="KL to the base, nats per token", yscale="log")
        right.set_title("solid: weights θ(λ), dashed: linearized")
        marked = [Line2D([], [], color=look.color, marker=look.marker, label=axis) for axis, look in marks.items()]
        figure.legend(handles=marked, loc="outside lower center", ncols=4)
    return path


def _positive(value: float) -> float:
    return value if value > 0 else math.nan


def plot_range(found: SafeRange, path: Path) -> Path:
    """The gaps of one axis, the limit as a line and the range as a band.

    Args:
        found: what to draw.
        path: of the PNG.

    Returns:
        `path`.
    """
    look = looks([found.axis])[found.axis]
    with drawing(path, (4.6, 3.4)) as figure:
        axes = figure.subplots()
        axes.axvspan(found.low, found.high, color="0.93", zorder=0)
        axes.axhline(found.limit, color=PALE, linewidth=1.2, zorder=1)
        shown = [(0.0, 0.0), *((probe.weight, probe.gap) for probe in found.probes if math.isfinite(probe.gap))]
        places, gaps = zip(*sorted(shown), strict=True)
        axes.plot(places, gaps, color=look.color, marker=look.marker, markersize=4, linewidth=1.2)
        axes.set(xlabel=f"λ_{found.axis}", ylabel=f"linearity gap ({found.measure})", title=found.text)
        axes.set_ylim(bottom=0.0)
    return path


def plot_additivity(found: Additivity, folder: Path) -> list[Path]:
    """A picture for each pair of axes: both ratios as heat maps over λ₁ and λ₂, sharing one scale from 0.

    Args:
        found: what to draw.
        folder: where to save.

    Returns:
        The PNG files.
    """
    names = [f"additivity-{file_name(pair.first)}-{file_name(pair.second)}.png" for pair in found.pairs]
    return [_plot_pair(pair, folder / name) for pair, name in zip(found.pairs, names, strict=True)]


def _plot_pair(pair: PairAdditivity, path: Path) -> Path:
    maps = {"of λ = 1, extrapolated": pair.ratio, "of each axis at its own λ": pair.interaction}
    known = [value for rows in maps.values() for row in rows for value in row if math.isfinite(value)]
    top = max([1.0, *known])
    with drawing(path, (9.2, 4.2)) as figure:
        panels = figure.subplots(1, 2)
        for axes, (title, rows) in zip(panels, maps.items(), strict=True):
            image = _heat_map(axes, pair, rows, top)
            axes.set(xlabel=f"λ_{pair.second}", ylabel=f"λ_{pair.first}", title=f"R, p_add {title}")
        figure.colorbar(image, ax=panels, label="R: JSD(actual, additive) / JSD(additive, base)")
    return path


def _heat_map(axes: Any, pair: PairAdditivity, rows: Sequence[Sequence[float]], top: float) -> Any:
    """A heat map with each number in its cell; "–" where there is none."""
    colors = color_map().with_extremes(bad="0.93")
    image = axes.imshow(rows, origin="lower", cmap=colors, vmin=0.0, vmax=top, aspect="auto")
    axes.set_xticks(range(len(pair.second_weights)), [number(x, "g") for x in pair.second_weights])
    axes.set_yticks(range(len(pair.first_weights)), [number(x, "g") for x in pair.first_weights])
    axes.spines[["top", "right"]].set_visible(True)
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            known = math.isfinite(value)
            ink = INK if not known or value > 0.6 * top else "white"
            axes.text(x, y, f"{value:.2f}" if known else "–", ha="center", va="center", color=ink, fontsize=7)
    return image
