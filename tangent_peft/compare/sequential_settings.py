"""What the comparison with sequential DPO trains and scores. Plain values; loads nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tangent_peft.compare.settings import Settings


METHODS = ("ts_dpo", "lora_soup")
# How the adapters of each are run: an axis linearized or as weights, a LoRA as weights.
EVALUATED = {"ts_dpo linearized": "ts_dpo", "ts_dpo merged": "ts_dpo", "lora_soup": "lora_soup"}


@dataclass(frozen=True)
class SequentialSettings(Settings):
    """A comparison of objectives trained one after the other with the same ones trained apart and combined.

    Fields of `Settings` mean the same here; those of mixes and fronts (`line`, `affine`, `divisions`, `mixed`) are not
    used. Stages have the steps, pairs and options of the trainings of a single axis, and the first stage of a sequence
    is one of them.

    Attributes:
        methods: `"ts_dpo"`, one tangent axis trained on; `"lora_soup"`, one LoRA trained on; or both.
        rank: of the axes; `None`: dense.
        lm_head: whether the axes have the head as well, which a LoRA has not.
        combined: λ of the objectives, in the order of `axes`, at which the ones trained apart are combined.
        conflict_steps: gradients are compared at the first step of a later stage and every so many.
        conflict_pairs: held-out pairs of each earlier objective per comparison of gradients, an even number. They are
            pairs of the test split that are not scored, and pairs of the training split that were not drawn, of any
            objective.
        project_conflicts: PCGrad in later stages.
    """

    methods: tuple[str, ...] = METHODS
    seeds: tuple[int, ...] = (0,)
    rank: int | None = 16
    lm_head: bool = False
    combined: tuple[tuple[float, ...], ...] = ((1.0, 1.0), (0.5, 0.5))
    conflict_steps: int = 4
    conflict_pairs: int = 8
    project_conflicts: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := [method for method in self.methods if method not in METHODS]:
            raise ValueError(f"`methods` holds {unknown}; sequences are trained of {', '.join(METHODS)}.")
        if not self.combined:
            raise ValueError("`combined` is empty. Give λ of all axes at which to combine them, such as [[1.0, 1.0]].")
        for weights in self.combined:
            if len(weights) != len(self.axes) or not all(math.isfinite(weight) for weight in weights):
                raise ValueError(f"`combined` holds {list(weights)}; give one finite λ for each of {list(self.axes)}.")
        if self.conflict_steps < 1:
            raise ValueError(f"`conflict_steps` is at least 1; found {self.conflict_steps}.")
        if self.conflict_pairs < 2 or self.conflict_pairs % 2:
            raise ValueError(f"`conflict_pairs` is an even number of at least 2; found {self.conflict_pairs}.")

    def orders(self) -> list[list[str]]:
        """The order of `axes`, and the reverse one."""
        names = list(self.axes)
        return [names, names[::-1]]

    def combinations(self) -> list[dict[str, float]]:
        """The mixes of all axes."""
        return [dict(zip(self.axes, weights, strict=True)) for weights in self.combined]

    def mixes(self) -> list[dict[str, float]]:
        """What is scored of the axes trained apart: each alone, which is a first stage, and their combinations."""
        return [*({axis: 1.0} for axis in self.axes), *self.combinations()]

    def sources(self) -> list[str]:
        """The ways in which adapters are run."""
        chosen = {"lora_soup", *(f"ts_dpo {evaluation}" for evaluation in self.evaluations)}
        return [source for source, method in EVALUATED.items() if method in self.methods and source in chosen]


def stage_name(method: str, trained: list[str]) -> str:
    """The folder of a later stage, after these objectives in this order."""
    return f"sequential-{method}-{'-'.join(trained)}"
