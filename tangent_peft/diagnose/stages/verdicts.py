"""What a `Forgetting` says in words, beside what the paper found (arXiv 2606.19744)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tangent_peft.diagnose.result import Verdict
from tangent_peft.diagnose.stages.transfer import contrast, differs, mean_and_error


if TYPE_CHECKING:
    from tangent_peft.diagnose.stages.forgetting import Change, Forgetting, Quartile


ORTHOGONAL = 0.1  # |mean cosine| below which gradients are called near-orthogonal
FINDINGS = {"partial degradation": "warning", "redistribution": "warning", "unknown": "unknown"}


def verdicts_on(result: Forgetting) -> list[Verdict]:
    """One line per earlier objective and stage, one on its quartiles, one per pair of gradients, one on the whole."""
    lines = []
    for change in result.forgotten():
        lines.append(_change(result, change))
        lines += _quartiles(result, change)
    if not lines:
        lines.append(Verdict("unknown", "One stage was trained, so there is nothing that it could have made forget."))
    lines += _gradients(result)
    lines += _whole(result)
    return lines


def _change(result: Forgetting, change: Change) -> Verdict:
    before, after = (result.standing(change.objective, stage) for stage in (change.before, change.after))
    flips = round(change.lost * change.pairs), round(change.gained * change.pairs)
    text = (
        f"{change.objective} after {change.after}: {change.pattern}. Margin {before.margin:.3g} → {after.margin:.3g} "
        f"({change.margin:+.3g} ± {change.margin_error:.2g}), accuracy {before.accuracy:.2f} → {after.accuracy:.2f}; "
        f"of {change.pairs} pairs {flips[0]} turn to the rejected answer and {flips[1]} to the chosen one."
    )
    return Verdict(FINDINGS.get(change.pattern, "fine"), text)  # type: ignore[arg-type]


def _quartiles(result: Forgetting, change: Change) -> Iterator[Verdict]:
    if change.objective in result.reasons:
        yield Verdict("unknown", f"{change.objective}: no quartiles, {result.reasons[change.objective]}.")
        return
    by_stage, by_base = (_ends(result, change, ranked_by) for ranked_by in ("stage", "base"))
    shown = [" and ".join(f"{_signed(q.change)} (Q{q.quartile})" for q in ends) for ends in (by_stage, by_base)]
    place = f"{change.objective} after {change.after}"
    text = f"{place}, Δg by g after {change.before}: {shown[0]}; by the base's g: {shown[1]}."
    stage, base = (contrast([top], [bottom]) for bottom, top in (by_stage, by_base))
    if differs(*base):
        yield Verdict("warning", f"{text} By the base's, the two differ: pairs of unlike standing were moved unlike.")
    elif differs(*stage) and stage[0] < 0:
        yield Verdict("unknown", f"{text} Only the first two differ: regression to the mean explains that as well.")
    elif differs(*stage):
        yield Verdict("warning", f"{text} The first two differ, and not as regression to the mean would have it.")
    else:
        yield Verdict("fine", f"{text} Top and bottom do not differ.")


def _ends(result: Forgetting, change: Change, ranked_by: str) -> list[Quartile]:
    """The lowest and the highest quartile."""
    place = (change.objective, change.after, ranked_by)
    found = [q for q in result.quartiles if (q.objective, q.after, q.ranked_by) == place]
    return [found[0], found[-1]]


def _signed(value: float) -> str:
    return f"{value:+.3g}"


def _gradients(result: Forgetting) -> Iterator[Verdict]:
    for conflict in result.conflicts:
        values = [value for value in conflict.cosines if math.isfinite(value)]
        name = f"Gradients of {conflict.stage} and {conflict.previous}"
        if not values:
            yield Verdict("unknown", f"{name}: no cosine was measured.")
            continue
        mean, error = mean_and_error(values)
        held = [value for value in conflict.agreement if math.isfinite(value)]
        text = f"{name}: mean cosine {mean:+.3f} over {len(values)} steps ({min(values):+.3f} to {max(values):+.3f})"
        if held:
            text += f"; two halves of a batch of {conflict.previous} itself have {sum(held) / len(held):+.3f}"
        if abs(mean) < ORTHOGONAL:
            changes = [c for c in result.forgotten() if (c.objective, c.after) == (conflict.previous, conflict.stage)]
            pattern = f" {conflict.previous} shows {changes[0].pattern}." if changes else ""
            yield Verdict(
                "unknown",
                f"{text}. Near-orthogonal, as in the paper, so the cosine can not diagnose interference.{pattern}",
            )
        elif not differs(mean, error, len(values)):
            yield Verdict("unknown", f"{text}. The steps differ too much among themselves to tell its sign.")
        else:
            yield Verdict("warning" if mean < 0 else "fine", f"{text}. {'Against' if mean < 0 else 'With'} each other.")


def _whole(result: Forgetting) -> Iterator[Verdict]:
    patterns = sorted({change.pattern for change in result.forgotten()})
    if len(result.forgotten()) > 1:
        text = (
            "More than one pattern, as in the paper" if len(patterns) > 1 else "One pattern only; the paper saw several"
        )
        yield Verdict("fine" if len(patterns) > 1 else "unknown", f"{text}: {', '.join(patterns)}.")
