"""What a further stage of DPO did to the objectives of the stages before it (arXiv 2606.19744).

For a pair (x, y_w, y_l), with π₀ the base, which is the reference at every stage:

    m = β [log π/π₀ (y_w|x) − log π/π₀ (y_l|x)]            DPO-relative margin
    g = log π(y_w|x) / |y_w| − log π(y_l|x) / |y_l|        length-normalized policy margin, nats per token

Means of m and g hide what single pairs do, so pairs are put into quartiles and followed. Quartiles by g after the
earlier stage, the paper's, show a fall of the top one and a rise of the bottom one even where nothing but noise
happened: what stands high by chance is lower the next time (regression to the mean). Quartiles by the base model's g,
which no training has touched, do not. Both are given. Works on log-probs alone and knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from tangent_peft.diagnose.result import Cell, Diagnosis, Table, Verdict
from tangent_peft.diagnose.stages.pictures import draw_quartiles, draw_transfer
from tangent_peft.diagnose.stages.transfer import (
    MIN_PAIRS,
    Change,
    Followed,
    ObjectiveScores,
    Quartile,
    Standing,
    check_scores,
)
from tangent_peft.diagnose.stages.verdicts import verdicts_on
from tangent_peft.tuner.movement import Movement


# ---- what goes in ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conflict:
    """Cosines of the gradient of a later stage with that of an objective before it, as the trainer logs them.

    Attributes:
        stage: the objective of the later stage.
        previous: the objective before it.
        cosines: one per measured step, or several steps' mean.
        agreement: of the two halves of each held-out batch of `previous` with each other; empty if not measured.
    """

    stage: str
    previous: str
    cosines: list[float]
    agreement: list[float] = field(default_factory=list)


# ---- what comes out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forgetting(Diagnosis):
    """Result of `forgetting`.

    Attributes:
        stages: the objectives in the order they were trained in.
        beta: β of m.
        pairs: number of held-out pairs by objective.
        standings: the transfer matrix, objective by objective, the base first.
        changes: from each stage to the next, the first from the base.
        quartiles: of the changes after the first stage.
        conflicts: gradient cosines, where they were measured.
        movements: of the adapter in each later stage, by its objective, where it was measured.
        reasons: why there are no quartiles, by objective.
    """

    title: ClassVar[str] = "Forgetting over stages of DPO"

    stages: list[str]
    beta: float
    pairs: dict[str, int]
    standings: list[Standing]
    changes: list[Change]
    quartiles: list[Quartile]
    conflicts: list[Conflict]
    movements: dict[str, Movement]
    reasons: dict[str, str]

    def standing(self, objective: str, stage: str) -> Standing:
        """A cell of the transfer matrix."""
        return next(s for s in self.standings if (s.objective, s.stage) == (objective, stage))

    def forgotten(self) -> list[Change]:
        """The changes that forgetting is about: of objectives trained before, in a later stage."""
        return [change for change in self.changes if change.role == "previous"]

    def tables(self) -> list[Table]:
        """Transfer matrix, paired changes, quartiles, gradients, movement."""
        return [table for table in self._tables() if table.rows]

    def _tables(self) -> Iterator[Table]:
        note = f"m: DPO-relative margin, β = {self.beta:g}; g: length-normalized policy margin, nats per token"
        head = ["objective", "after", "m", "± s.e.", "P(m > 0)", "g", "P(g > 0)"]
        yield Table("Transfer matrix", head, [_cells(s) for s in self.standings], note)
        head = ["objective", "from", "to", "role", "pairs", "Δm", "± s.e.", "ΔP(m > 0)", "Δg", "± s.e."]
        head += ["improved", "lost", "gained", "pattern"]
        changes = [[*_cells(c)[:-1], None if c.role == "trained" else c.pattern] for c in self.changes]
        note = "Patterns are of objectives that the stage does not train."
        yield Table("Pair by pair, from stage to stage", head, changes, note)
        head = ["objective", "from", "to", "ranked by", "quartile", "pairs", "g from", "g to", "Δg", "± s.e."]
        head += ["improved", "lost", "gained"]
        note = (
            "Ranked by `stage`, g after the earlier stage, quartiles regress to the mean; ranked by `base` they do not."
        )
        yield Table("Quartiles of g", head, [_cells(q) for q in self.quartiles], note)
        rows: list[list[Cell]] = [
            [c.stage, c.previous, len(_finite(c.cosines)), _mean(c.cosines), _mean(c.agreement)] for c in self.conflicts
        ]
        head = ["stage", "previous", "measured", "mean cosine", "halves of the previous batch"]
        note = "Two halves of one held-out batch show how far noise alone lowers a cosine."
        yield Table("Gradients of the stage and of the objectives before it", head, rows, note)
        head = ["stage", "‖Δ₁‖", "‖Δ₂‖", "‖Δ₂ − Δ₁‖", "‖Δ₂ − Δ₁‖ / ‖Δ₁‖", "cos(Δ₂ − Δ₁, Δ₁)"]
        yield Table("Movement of the adapter, ΔW", head, [[s, *_cells(m)] for s, m in self.movements.items()])

    def verdicts(self) -> list[Verdict]:
        """What happened to each earlier objective, and whether the paper's findings hold here."""
        return verdicts_on(self)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws margins and accuracy over the stages, and the quartiles under both rankings."""
        made = [draw_transfer(self, Path(folder) / "forgetting-transfer")]
        return made + ([draw_quartiles(self, Path(folder) / "forgetting-quartiles")] if self._has_quartiles() else [])

    def _has_quartiles(self) -> bool:
        return any(
            math.isfinite(q.change) and (c.objective, c.after) == (q.objective, q.after)
            for q in self.quartiles
            for c in self.forgotten()
        )


def _cells(row: Standing | Change | Quartile | Movement) -> list[Cell]:
    return list(vars(row).values())


def _finite(values: Sequence[float]) -> list[float]:
    """Without the steps at which a gradient was zero or overflowed."""
    return [value for value in values if math.isfinite(value)]


def _mean(values: Sequence[float]) -> float:
    found = _finite(values)
    return sum(found) / len(found) if found else math.nan


# ---- the function ----------------------------------------------------------------------------------------------------


def forgetting(
    scores: Mapping[str, ObjectiveScores],
    stages: Sequence[str],
    beta: float,
    conflicts: Sequence[Conflict] = (),
    movements: Mapping[str, Movement] | None = None,
) -> Forgetting:
    """Follows every objective's held-out pairs through the stages of a sequential training.

    Args:
        scores: of each objective, scored after every stage, whether it was trained by then or not.
        stages: the objectives in the order they were trained in, each once.
        beta: β of the training.
        conflicts: gradient cosines of later stages, if measured.
        movements: of the adapter by later stage, if measured.

    Returns:
        The result, standard errors over the pairs.

    Raises:
        ValueError: for no stage, an objective without scores, an empty completion, log-probs that are not finite, or
            shapes that do not fit; each is named.
    """
    stages = list(stages)
    check_scores(scores, stages, beta)
    standings: list[Standing] = []
    changes: list[Change] = []
    quartiles: list[Quartile] = []
    for objective, found in scores.items():
        follow = Followed(objective, found, stages, beta)
        standings += follow.standings()
        quartiles += (own := list(follow.quartiles()))
        changes += follow.changes(own)
    few = {name: len(s.reference) for name, s in scores.items() if len(s.reference) < MIN_PAIRS}
    reasons = {name: f"{n} held-out pairs; quartiles need at least {MIN_PAIRS}" for name, n in few.items()}
    return Forgetting(
        stages,
        beta,
        {name: len(s.reference) for name, s in scores.items()},
        standings,
        changes,
        quartiles,
        list(conflicts),
        dict(movements or {}),
        reasons,
    )
