"""The sections of a diagnosis: what each asks, what it needs, and how it is made of what was loaded.

One small function per section, each giving the parts of its section as names and calls that nothing has run yet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tangent_peft.cli.diagnose_data import Data
from tangent_peft.cli.diagnose_subject import Loaded, Subject
from tangent_peft.diagnose.result import Diagnosis


Task: TypeAlias = tuple[str, Callable[[], Diagnosis]]
Need: TypeAlias = Literal["models", "axes", "two axes", "pairs", "sequential"]


@dataclass(frozen=True)
class How:
    """How everything is measured.

    Attributes:
        limit: linearity gap at which λ stops being safe.
        weights: λ at which the gap is measured; empty for the usual ones.
        seed: of permutations and random controls.
        batch_size: rows of a forward.
    """

    limit: float = 0.5
    weights: tuple[float, ...] = ()
    seed: int = 0
    batch_size: int = 8


@dataclass(frozen=True)
class Inputs:
    """Everything that a section is made of.

    Attributes:
        subject: what is diagnosed.
        loaded: it, in memory; `None` if only the result of a sequential training is.
        data: prompts and pairs.
        how: numbers.
        sequential: file with the result of a sequential training.
    """

    subject: Subject
    loaded: Loaded | None
    data: Data
    how: How
    sequential: Path | None

    @property
    def models(self) -> Loaded:
        """What was loaded.

        Raises:
            ValueError: if nothing was.
        """
        if self.loaded is None:
            raise ValueError("No model was loaded. Give folders of saved axes, or a checkpoint.")
        return self.loaded

    @property
    def model(self) -> Any:
        """The model with the tangent axes."""
        return self.models.base.model


@dataclass(frozen=True)
class Kind:
    """A section that can be made.

    Attributes:
        key: its name on the command line.
        title: its heading.
        about: what it asks.
        needs: what it can not do without.
        tasks: its parts.
    """

    key: str
    title: str
    about: str
    needs: tuple[Need, ...]
    tasks: Callable[[Inputs], Sequence[Task]]

    def missing(self, subject: Subject, data: Data, sequential: Path | None) -> str:
        """What it needs and is not given, as the end of a sentence; empty if nothing."""
        given: dict[Need, tuple[bool, str]] = {
            "models": (bool(subject.base), "needs saved axes, or a checkpoint and its base"),
            "axes": (bool(subject.axes), "needs tangent axes"),
            "two axes": (len(subject.axes) > 1, "needs two tangent axes"),
            "pairs": (bool(data.pairs), "needs --pairs"),
            "sequential": (sequential is not None, "needs --sequential with a result of `tangent-peft sequential`"),
        }
        return next((reason for need in self.needs for there, reason in [given[need]] if not there), "")


_KINDS: list[Kind] = []
SECTIONS: dict[str, Kind] = {kind.key: kind for kind in _KINDS}
